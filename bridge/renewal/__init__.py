"""
The main job: select, prepare, issue, verify, install, activate, conclude; online and by air gap.

How each step is done is below; what is printed is above.
"""
