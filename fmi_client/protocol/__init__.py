"""The wire formats, without any I/O: bytes in, events and bytes out, time as an argument.

The only part of the client that the server may import.
"""
