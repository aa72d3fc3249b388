"""What all rooms know about FX graphs: editing them, where a node comes from, how a tensor lies in memory, bytes and FLOPs."""
