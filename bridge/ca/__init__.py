"""Asking CAs: which backend is for which authority, retries, what is proven of one before and after it signs."""
