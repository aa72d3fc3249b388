"""The passes over the joint graph, in run order.

Each pass is a pure decision, which looks, or a pure edit, which changes a graph. No pass is both.
`runner` runs them, once to plan and once to rewrite.

Planning, from `PLANNING` in `runner`:

1. `merge_duplicates` (in `runner`)  edit: merge equal nodes, and number the nodes anew
2. `survey`         what plain Inductor would save for backward, and how many bytes that is
3. `classify`       which nodes are forward values, and which depend on the tangents
4. `assign_roles`   (`roles`) who reads each saved value in backward: weight-gradient matmuls (W),
                    or anything else (A)
5. `find_sentinels` (`sentinels`) which values may hold numbers that stand for "nothing here"
6. `plan`           how to store each value, and why everything else is kept

Rewriting, from `REWRITING` in `runner`:

1. `merge_duplicates`, as above
2. `check_fingerprint` (in `runner`)  is this the graph that was planned?
3. `rewrite`        edit: encode in forward, decode in backward, clone what backward computes from
                    a decoded value
4. `factor`         edit: take weight gradients from the coordinates, so that nothing is decoded
5. `partition`      split the graph by min-cut, and check the invariants that must hold afterwards
6. `sample`         edit: the forward graph copies some rows of each encoded value, for the refresh
                    of the basis
7. `expand`         (`prac_fx.graph.inliner`) edit: the operators of each encoding and decoding in
                    the place of its node
8. `tabulate`       edit: what depends on the position alone is stored once in each of both graphs

The other files are parts of a pass, or data that passes share:

- of the whole: `joint_graph` is the graph with what is known of it. `plan_data` is the plan.
  `encoded` is what `rewrite` has put into a graph. `draws` tells what draws random numbers.
- of `plan`, a draft: `choose` finds the codec that the options choose. `sites` makes the site of a
  value. `common_matrix` is what all weight gradients of a value read, `weight_products` are the
  operators that compute them. `routing` finds the routers of experts. `rows` makes the rows of the
  report. `ranks` are PRAC's. `worthwhile` tells whether PRAC costs less than exact weight
  gradients. `quantizer` is the codec in few bits. `sizes` tells which symbolic sizes are large
  enough, with one guard for a graph. `chains` tells what lies between a stored value and its
  readers. `masks` are what backward may not compute from a decoded value.
- of `plan`, the judgement: `soundness` follows the errors of a draft's decoded values through
  backward. It uses the table in `operators`, with `ranges`, `exponentials` and `sentinels`. `amend`
  changes what is at fault.
- of `rewrite`: `redirect` has backward read decoded values. `rounding_numbers` are the random
  numbers that sites round with.
"""
