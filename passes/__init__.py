"""The joint-graph passes, in run order. Each is a pure decision or a pure edit, never both.

1. `classify`   which nodes are forward values, which depend on the tangents
2. `survey`     what plain Inductor would save for backward, and how many bytes that is
3. `roles`      who reads each saved value in backward: weight-gradient matmuls (W), anything else (A)
4. `chains`     what stands between a stored value and the backward nodes that need something made of it
5. `plan`       how to store each value, and why everything else is kept; `ranks` are PRAC's,
                `quantizer` the codec in few bits that the options ask for, `masks` what backward may not compute from a
                decoded value, `sizes` which symbolic sizes are large enough, with one guard for a graph;
                `soundness` follows the errors of a draft's decoded values through backward, by the table in `operators`,
                with `ranges` and `sentinels`, and `amend` changes what is at fault
6. `rewrite`    edit: encode in forward, decode in backward, clone what backward computes from a decoded value
7. `factor`     edit: a weight gradient is taken from the coordinates, the decoded value disappears
8. `sample`     edit: the forward graph copies some rows of each encoded value for the basis refresh
9. `partition`  min-cut, and the invariants that must hold afterwards

1 to 5 look and write nothing; 6 and 7 edit the joint graph; 8 runs inside 9 on the forward graph.
"""
