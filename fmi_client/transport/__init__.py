"""Sockets: punching, links between ranks, the connection to the server, links in memory."""
