"""The whole program against real control planes and real CAs."""
