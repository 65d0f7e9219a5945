"""The operating system: files, processes, HTTP, the terminal; it knows nothing about certificates or components."""
