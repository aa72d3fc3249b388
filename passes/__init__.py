"""The joint-graph passes, in run order. Each is a pure decision or a pure edit, never both.

1. `classify`   which nodes are forward values, which depend on the tangents
2. `survey`     what plain Inductor would save for backward, and how many bytes that is
3. `roles`      who reads each saved value in backward: weight-gradient matmuls (W), anything else (A)
4. `plan`       what to encode, with which codec, and why everything else is kept
5. `rewrite`    edit: encode in forward, decode in backward, redirect the readers
6. `factor`     edit: a weight gradient is taken from the coordinates, the decoded value disappears
7. `sample`     edit: the forward graph copies some rows of each encoded value for the basis refresh
8. `partition`  min-cut, and the invariants that must hold afterwards

1 to 4 look and write nothing; 5 and 6 edit the joint graph; 7 runs inside 8 on the forward graph.
"""
