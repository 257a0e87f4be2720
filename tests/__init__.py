"""The tests, in a folder for each subject. Only `support` is imported by others, and `emulator`, which is a machine."""
