"""
The settings file: its tables, how it is read, and the windows that it names.

What a setting is good for is known by who uses it.
"""
