"""What the numbers of a report say to do, in sentences."""

from __future__ import annotations

from prac_fx.document.schema import Alternative, Category, Document
from prac_fx.graph.nbytes import format_nbytes

# Shares of the peak from which on something is worth a sentence.
_MUCH = 0.2
# Recomputation below this share of the step's FLOPs is as good as free.
_FREE_FLOPS = 0.005


def advice_for(document: Document) -> list[str]:
    """Sentences, the most useful first; the document's own advice is not read."""
    sentences = [_about_prac(document), _about_loss(document), _about_returned_values(document)]
    sentences += [_about_free_recomputation(document), _about_optimizer(document)]
    sentences.append(_about_parameters(document))
    return [sentence for sentence in sentences if sentence]


def _share_at_peak(document: Document, category: Category) -> float:
    if document["peak"] is None:
        return 0.0
    peak = document["peak"]["after"]
    nbytes = sum(entry["nbytes"] for entry in peak["live"] if entry["category"] == category)
    return nbytes / peak["nbytes"] if peak["nbytes"] else 0.0


def _about_prac(document: Document) -> str:
    peak = document["peak"]
    saved = document["totals"]["saved_before_nbytes"] - document["totals"]["saved_after_nbytes"]
    if not saved:
        return (
            'backend="prac" would encode nothing: the reasons in the table of values say why, '
            "value by value"
        )
    if peak is None:
        return ""
    before, after = peak["before"]["nbytes"], peak["after"]["nbytes"]
    if before - after < 0.02 * before:
        return (
            f'backend="prac" saves {format_nbytes(saved)} between forward and backward, but the '
            "peak lies elsewhere and hardly moves: see what is alive there"
        )
    return (
        f'backend="prac" takes {format_nbytes(before - after)} off the peak '
        f"({(before - after) / before:.0%})"
    )


def _about_loss(document: Document) -> str:
    share = _share_at_peak(document, "loss")
    if share < _MUCH:
        return ""
    return (
        f"logits and what the loss makes of them are {share:.0%} of the peak: chunk the loss "
        "(Inductor's auto_chunker.enable, or a fused linear cross entropy); compression cannot "
        "help there"
    )


def _about_returned_values(document: Document) -> str:
    returned = [value for value in document["values"] if value["reason"] == "user_output"]
    nbytes = sum(value["nbytes_after"] for value in returned if value["category"] != "loss")
    if nbytes <= _MUCH * document["totals"]["saved_after_nbytes"]:
        return ""
    return (
        f"{format_nbytes(nbytes)} of what stays are returned by the model as well, so that nothing "
        "can encode them: return less (a transformers model returns its keys and values unless it "
        "is called with use_cache=False)"
    )


def _about_free_recomputation(document: Document) -> str:
    plain = _named(document, "inductor")
    if plain is None or not plain["saved_nbytes"]:
        return ""
    for row in document["alternatives"]:
        saved, flops = row["saved_nbytes"], row["added_flops"]
        if not row["name"].startswith("budget") or saved is None or flops is None:
            continue
        less = 1 - saved / plain["saved_nbytes"]
        if less >= 0.1 and flops <= _FREE_FLOPS and row["gradient"] == "exact":
            budget = row["name"].removeprefix("budget ")
            return (
                f"activation_memory_budget={budget} saves {less:.0%} of what is kept for backward "
                "with exact gradients and without another matmul"
            )
    return ""


def _named(document: Document, name: str) -> Alternative | None:
    return next((row for row in document["alternatives"] if row["name"] == name), None)


def _about_optimizer(document: Document) -> str:
    share = _share_at_peak(document, "optimizer")
    if share < _MUCH:
        return ""
    return (
        f"the state of {document['totals']['optimizer']} is {share:.0%} of the peak and does not "
        "depend on the batch: an 8-bit or factored optimizer, or sharding, helps there"
    )


def _about_parameters(document: Document) -> str:
    share = _share_at_peak(document, "parameters") + _share_at_peak(document, "gradients")
    if share < 0.5:
        return ""
    return (
        f"parameters and gradients are {share:.0%} of the peak: activations matter little at this "
        "batch size"
    )
