"""What all rooms know about FX graphs.

How to edit them, where a node comes from, how a tensor lies in memory, and how many bytes and FLOPs
there are.
"""
