"""The operating system: files, processes, HTTP, the terminal; nothing here knows certificates or components."""
