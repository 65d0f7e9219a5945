"""The settings file: its tables, how it is read, and its maintenance windows."""
