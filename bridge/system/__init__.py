"""
The operating system as the program wants it: files, processes, HTTPS, the terminal.

Nothing here knows a certificate's purpose, a CA or a component.
"""
