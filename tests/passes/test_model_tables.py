"""What is saved for backward in real transformer blocks, and what becomes of it; torch 2.11 to 2.15."""

from __future__ import annotations

import re
from typing import Any

from expecttest import assert_expected_inline
from torch import nn

from tests import models
from tests.graphs import rows_of, trace


def _table(built: tuple[nn.Module, dict[str, Any]]) -> str:
    model, inputs = built
    return rows_of(trace(lambda: model(**inputs).loss).plan)


def test_llama() -> None:
    assert_expected_inline(
        _table(models.llama()),
        """\
model.model.embed_tokens                   8x64x64      A    keep      input_gradient_reads_it
model.model.layers.0.input_layernorm       8x64x1       A    keep      statistic
model.model.layers.0.self_attn.q_proj      512x64       W    encode    prac 19+19/64
model.model.layers.0.self_attn             8x4x64x16    A    keep      attention_reads_it
model.model.layers.0.self_attn             8x4x64x16    A    keep      attention_reads_it
model.model.layers.0.self_attn             8x4x64x16    A    keep      attention_reads_it
model.model.layers.0.self_attn             8x1x64x64    A    keep      not_an_activation
model.model.layers.0.self_attn             8x4x64x16    W+A  keep      attention_reads_it
model.model.layers.0.self_attn             8x4x64       A    keep      statistic
model.model.layers.0.self_attn.o_proj      512x64       A    keep      input_gradient_reads_it
model.model.layers.0.post_attention_layernorm 8x64x1       A    keep      statistic
model.model.layers.0.mlp.gate_proj         512x64       W    encode    prac 19+19/64
model.model.layers.0.mlp.gate_proj         512x192      A    keep      input_gradient_reads_it
model.model.layers.0.mlp.up_proj           512x192      A    keep      input_gradient_reads_it
model.model.layers.0.mlp.down_proj         512x192      W    encode    prac 57+57/192 x3
model.model.layers.0                       8x64x64      A    keep      input_gradient_reads_it
model.model.norm                           8x64x1       A    keep      statistic
model.lm_head                              512x64       W    encode    prac 19+19/64
model.lm_head                              512x96       A    keep      loss_intermediate
model                                      8x65         A    keep      not_floating_point
model                                      512x1        A    keep      statistic
model                                      512x1        A    keep      statistic
model                                                   A    keep      statistic""",
    )


def test_gpt2() -> None:
    assert_expected_inline(
        _table(models.gpt2()),
        """\
model.transformer.wte                      8x64x64      A    keep      input_gradient_reads_it
model.transformer                          1x64         A    keep      not_an_activation
model.transformer.wpe                      1x64x64      A    keep      not_an_activation
model.transformer.h.0.ln_1                 8x64x1       A    keep      statistic
model.transformer.h.0.ln_1                 8x64x1       A    keep      statistic
model.transformer.h.0.ln_1                 64x512       W    encode    prac 19+19/64
model.transformer.h.0.attn                 8x4x64x16    A    keep      shared_storage
model.transformer.h.0.attn                 8x4x64x16    A    keep      attention_reads_it
model.transformer.h.0.attn                 8x4x64x16    A    keep      shared_storage
model.transformer.h.0.attn                 8x1x64x64    A    keep      not_an_activation
model.transformer.h.0.attn                 8x4x64x16    W+A  keep      attention_reads_it
model.transformer.h.0.attn                 8x4x64       A    keep      statistic
model.transformer.h.0.ln_2                 8x64x64      A    keep      input_gradient_reads_it
model.transformer.h.0.ln_2                 64x512       W    encode    prac 19+19/64
model.transformer.h.0.mlp.c_fc             512x256      A    keep      input_gradient_reads_it
model.transformer.h.0.mlp.act              256x512      W    encode    prac 76+76/256 x4
model.transformer.ln_f                     8x64x64      A    keep      input_gradient_reads_it
model.lm_head                              512x64       W    encode    prac 19+19/64
model.lm_head                              512x96       A    keep      loss_intermediate
model                                      8x65         A    keep      not_floating_point
model                                      512x1        A    keep      statistic
model                                      512x1        A    keep      statistic
model                                                   A    keep      statistic
model.transformer.ln_f                     8x64x1       A    keep      statistic
model.transformer.h.0.ln_2                 8x64x1       A    keep      statistic""",
    )


def test_roberta() -> None:
    # before torch 2.15 a dropout of 0 leaves a node
    found = re.sub(
        r"model\.classifier\.dropout +", "model.classifier".ljust(43), _table(models.roberta())
    )
    assert_expected_inline(
        found,
        """\
model.roberta.embeddings                   16x64        A    keep      not_floating_point
model.roberta.embeddings                   16x64        A    keep      not_floating_point
model.roberta.embeddings.LayerNorm         16x64x64     A    keep      input_gradient_reads_it
model.roberta.encoder.layer.0.attention.self.query 1024x64      W    encode    prac 19+19/64
model.roberta.encoder.layer.0.attention.self 16x4x64x16   A    keep      attention_reads_it
model.roberta.encoder.layer.0.attention.self 16x4x64x16   A    keep      attention_reads_it
model.roberta.encoder.layer.0.attention.self 16x4x64x16   A    keep      attention_reads_it
model.roberta.encoder.layer.0.attention.self 16x1x64x64   A    keep      statistic
model.roberta.encoder.layer.0.attention.self 16x4x64x16   W+A  keep      attention_reads_it
model.roberta.encoder.layer.0.attention.self 16x4x64      A    keep      statistic
model.roberta.encoder.layer.0.attention.output.LayerNorm 16x64x64     A    keep      input_gradient_reads_it
model.roberta.encoder.layer.0.intermediate.dense 1024x64      W    encode    prac 19+19/64
model.roberta.encoder.layer.0.intermediate.dense 1024x256     A    keep      input_gradient_reads_it
model.roberta.encoder.layer.0.output.dense 1024x256     W    encode    prac 76+76/256 x4
model.roberta.encoder.layer.0.output.LayerNorm 16x64x64     A    keep      input_gradient_reads_it
model.classifier                           16x64        W    keep      too_few_tokens
model.classifier                           16x64        W+A  keep      also_read_elsewhere
model.classifier.out_proj                  16x2         A    keep      loss_intermediate
model                                                   A    keep      statistic
model.roberta.encoder.layer.0.output.LayerNorm 16x64x1      A    keep      statistic
model.roberta.encoder.layer.0.attention.output.LayerNorm 16x64x1      A    keep      statistic
model.roberta.embeddings.LayerNorm         16x64x1      A    keep      statistic""",
    )
