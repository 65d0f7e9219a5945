"""The main job: select, prepare, issue, verify, install, activate, conclude; online and by air gap."""
