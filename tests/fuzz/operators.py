"""The statements that programs are made of: a maker looks at a value and proposes code, or None."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class Builder:
    """What a maker may look at: the values so far, by name, and the attributes of the model."""

    rng: random.Random
    values: dict[str, Tensor]
    tokens: dict[str, int] = field(default_factory=dict)
    members: dict[str, str] = field(default_factory=dict)
    used: list[str] = field(default_factory=list)

    def member(self, constructor: str, share: float = 0.1) -> str:
        """An attribute made by `constructor`; now and then one that exists already."""
        equal = [name for name, code in self.members.items() if code == constructor]
        if equal and self.rng.random() < share:
            name = self.rng.choice(equal)
        else:
            name = f"m{len(self.members)}"
            self.members[name] = constructor
        self.used.append(name)
        return f"self.{name}"

    def parameter(self, *shape: int) -> str:
        """A parameter with entries of about one over the root of its first dimension."""
        size = ", ".join(map(str, shape))
        fan = shape[0] if len(shape) == 2 else shape[-2] if len(shape) > 2 else 1
        return self.member(f"nn.Parameter(torch.randn({size}) / {fan}**0.5)", share=0.3)

    def width(self) -> int:
        """A number of features."""
        return self.rng.choice([1, 3, 7, 8, 16, 16, 31, 32, 32, 33, 64, 64, 127, 128, 130])

    def like(self, name: str) -> str:
        """A value of the same shape, perhaps itself."""
        value = self.values[name]
        return self.rng.choice(
            [n for n, v in self.values.items() if v.shape == value.shape and v.dtype == value.dtype]
        )


@dataclass(frozen=True)
class Draft:
    """Code for one statement, and the values it takes."""

    kind: str
    code: str
    args: tuple[str, ...]
    smooth: bool = True


Maker = Callable[[Builder, str], "Draft | None"]

ACTIVATIONS = (
    "F.gelu({0})|F.gelu({0}, approximate='tanh')|F.silu({0})|F.mish({0})|F.elu({0})|F.celu({0}, 0.7)|F.softplus({0})"
    "|F.logsigmoid({0})|torch.sigmoid({0})|torch.tanh({0})|F.softsign({0})|F.tanhshrink({0})|torch.sin({0})|torch.cos({0})"
    "|torch.atan({0})|torch.erf({0})|torch.asinh({0})|torch.exp(-{0}.square())|torch.exp({0}.clamp(max=2))|{0}.square()"
    "|torch.sinc({0})|F.softmin({0}, -1)|F.alpha_dropout({0}, 0.1, False)|{0} * torch.sigmoid({0})|{0}.sinh()|{0}.pow(3)"
).split("|")

# their derivatives jump, so backward needs masks of the exact values
KINKED = (
    "F.relu({0})|F.selu({0})|F.leaky_relu({0}, 0.1)|F.hardtanh({0})|F.hardswish({0})|F.hardsigmoid({0})|F.relu6({0})"
    "|F.softshrink({0}, 0.1)|F.hardshrink({0}, 0.1)|F.threshold({0}, 0.1, 0.0)|F.rrelu({0}, training=False)|F.elu({0}, 0.3)"
).split("|")

SINGULAR = (
    "torch.sqrt({0}.square() + 1e-6)|torch.hypot({0}, {0}.tanh())|torch.log({0}.abs() + 1e-3)|({0}.abs() + 0.01).reciprocal()"
    "|torch.rsqrt({0}.square() + 1e-3)|{0}.sign() * ({0}.abs() + 1e-8).sqrt()|({0}.abs() + 1e-4).pow(0.3)|{0}.abs().pow(1.5)"
    "|torch.atan2({0}, {0}.cos())|torch.lgamma({0}.abs() + 0.01)|torch.xlogy({0}.abs(), {0}.abs() + 1e-3)"
    "|{0} / ({0}.norm(dim=-1, keepdim=True) + 1e-6)|F.normalize({0}, dim=-1)|torch.log1p({0}.abs())|{0} / ({0}.abs() + 1e-2)"
    "|{0} * F.cosine_similarity({0}, {0}.tanh() + 0.1, dim=-1).unsqueeze(-1)|{0} / {0}.abs().amax(-1, keepdim=True)"
    "|torch.acos({0}.tanh() * 0.999)|torch.logit(torch.sigmoid({0}), 1e-4)|{0} / ({0}.std(-1, keepdim=True) + 1e-3)"
    "|torch.digamma({0}.abs() + 0.1)|torch.where({0} > 0, {0}.clamp(min=1e-4).log(), {0})|torch.linalg.vector_norm({0}, 3.0, -1, True)"
).split("|")

ROUNDING = (
    "{0} + ({0}.round() - {0}).detach()|RoundThrough.apply({0} * 4) / 4|{0}.sign() * {0}|{0} - {0}.floor()|{0}.trunc() * {0}"
    "|torch.fmod({0}, 0.7)|torch.remainder({0}, 0.7)|{0} * torch.heaviside({0}, torch.ones(()).to({0}))|{0} * ({0} * 2).round()"
    "|torch.fake_quantize_per_tensor_affine({0}, 0.1, 0, -16, 15)|{0} * torch.ceil({0}.detach())|{0} * {0}.frac()"
).split("|")

MASKS = (
    "torch.where({0} > 0.2, {0}, {0} * 0.1)|{0}.masked_fill({0} < 0, 0.5)|{0} * ({0} > 0)|{0}.clamp(-0.5, 0.8)"
    "|torch.maximum({0}, {0} * -0.3)|{0} * ({0} >= {0}.mean(-1, keepdim=True))|{0}.relu() * {0}|torch.minimum({0}, {0}.square())"
    "|torch.where({0}.abs() < 1, {0}.square(), 2 * {0}.abs() - 1)|{0} - {0}.amax(-1, keepdim=True)|{0} * torch.isfinite({0})"
    "|{0} * ({0} >= {0}.topk(1, -1).values)|torch.tril({0})|torch.triu({0})|{0}.abs()|{0}.clamp_min(0).square()"
    "|{0} * torch.logical_and({0} > -1, {0} < 1)|torch.clamp({0}, min={0}.detach().mean())"
).split("|")

INTEGER = (
    "{0} * F.one_hot({0}.argmax(-1), {0}.shape[-1])|{0}.gather(-1, {0}.argsort(-1))|{0}.sort(-1).values|{0}.topk({0}.shape[-1], -1).values"
    "|{0} * torch.bucketize({0}.detach(), torch.linspace(-2, 2, 9).to({0}))|{0} + ({0} * 3).to(torch.int32)|{0} * (torch.arange({0}.shape[-1]) % 3)"
    "|{0}.take_along_dim({0}.argmin(-1, keepdim=True), -1) + {0}|torch.cummax({0}, -1).values|{0}.median(-1, keepdim=True).values * {0}"
    "|{0} * (({0} * 8).to(torch.int8) & 3)"
).split("|")

VIEWS = (
    "{0}.transpose(-1, -2)|{0}.transpose(-1, -2).contiguous()|{0}.flip(-1)|{0}.roll(1, -1)|{0}[..., ::2]|{0}[..., 1:]|{0}.flatten(0, -2)"
    "|torch.cat([{0}, {0} * 2], -1)|torch.stack([{0}, -{0}], 1).flatten(0, 1)|torch.cat({0}.split(2, -1)[::-1], -1)"
    "|{0}.unsqueeze(1).expand(-1, 2, *{0}.shape[1:]).flatten(0, 1)|F.pad({0}, (1, 2))|{0}.repeat_interleave(2, -1)|{0}.narrow(-1, 0, {0}.shape[-1] // 2)"
    "|{0}.index_select(-1, torch.arange({0}.shape[-1] - 1, -1, -1))|{0}[..., torch.arange({0}.shape[-1]) // 2]|{0}.movedim(-1, 1)"
    "|torch.zeros_like({0}).index_add(-1, torch.arange({0}.shape[-1]) // 2, {0})|{0}.unflatten(-1, (-1, 2)).sum(-1)|{0}.chunk(2, -1)[0]"
    "|torch.zeros_like({0}).scatter_add(-1, torch.arange({0}.shape[-1]).expand({0}.shape) // 2, {0})|{0}.unbind(1)[0]|{0}.squeeze()"
    "|torch.as_strided({0}.contiguous(), {0}.shape, {0}.contiguous().stride())|{0}.diff(dim=-1)|{0}.clone()|{0}.double().to({0}.dtype)"
).split("|")

REDUCTIONS = (
    "{0}.cumsum(-1)|({0} * 0.1 + 1).cumprod(-1)|{0} - {0}.logsumexp(-1, keepdim=True)|{0}.softmax(-1)|{0}.log_softmax(-1)|{0} - {0}.mean(-1, keepdim=True)"
    "|{0} * {0}.mean(0, keepdim=True)|torch.logcumsumexp({0}, -1)|{0} * {0}.var(-1, keepdim=True)|{0} + ({0} * 0.1 + 1).prod(-1, keepdim=True)"
    "|{0} * {0}.sum(-1, keepdim=True).tanh()|F.avg_pool1d({0}, 2)|F.max_pool1d({0}, 2)|{0}.softmax(1)|F.softmax({0} * 3, -1)|{0}.amax(1, keepdim=True) + {0}"
).split("|")

COMPLEX = (
    "torch.fft.irfft(torch.fft.rfft({0}.float(), norm='ortho') * 0.5, n={0}.shape[-1], norm='ortho').to({0})|torch.fft.fft({0}.float(), norm='ortho').abs().to({0})"
    "|torch.view_as_real(torch.view_as_complex({0}.float().reshape(*{0}.shape[:-1], -1, 2)) * torch.polar(torch.ones({0}.shape[-1] // 2), torch.arange({0}.shape[-1] // 2).float())).flatten(-2).to({0})"
    "|torch.complex({0}.float(), {0}.float().cos()).abs().to({0})|torch.polar({0}.float().abs() + 0.1, {0}.float()).real.to({0})|torch.complex({0}.float(), {0}.float() * 0.5).square().imag.to({0})"
    "|torch.fft.rfft({0}.float(), norm='ortho').real.to({0})|torch.complex({0}.float(), {0}.float().tanh()).angle().to({0})"
).split("|")

IN_PLACE = (
    "{out} = {0}.clone()\n{out}.mul_(2).add_({0})|{out} = {0} * 1.0\n{out}[..., 0] = 0|{out} = {0}.clone()\n{out}[..., 1:] += {0}[..., :-1]"
    "|{out} = {0} + 0.5\n{out}.relu_()|{out} = {0} * 0.5\nF.silu({out}, inplace=True)|{out} = torch.sigmoid({0})\n{out}.transpose(-1, -2).mul_(0.5)"
    "|{out} = torch.tanh({0})\n{out} = {out}.mul_(2)|{out} = torch.zeros_like({0})\n{out}.copy_({0})\n{out}.clamp_(-1, 1)|{out} = {0} * 2\n{out}.masked_fill_({0} > 1, 0.0)"
).split("|")

GRADIENTS = (
    "{out} = {0} * 1.0\n{out}.register_hook(lambda g: g * 2)|{out} = {0} * 1.0\n{out}.register_hook(lambda g: g.clamp(-0.05, 0.05))|{out} = UnitGradient.apply({0})"
    "|{out} = ClippedGradient.apply({0})|with torch.no_grad():\n    {out} = {0}.abs().mean(-1, keepdim=True)\n{out} = {0} / ({out} + 0.5)"
    "|{out} = {0} * {0}.detach().tanh()|{out} = {0}.detach() + {0}.sin()|{out} = {0} * 1.0\n{out}.register_hook(lambda g: g / (g.norm() + 1e-6))"
    "|with torch.no_grad():\n    {out} = F.gelu({0})\n{out} = {out} + {0}"
).split("|")


def _in_one_line(code: str) -> str:
    """Code as a name."""
    return code.replace("{0}", "x").replace("{out}", "y").replace("\n", "; ")


def _table(kind: str, codes: list[str], *, smooth: bool) -> Maker:
    def maker(builder: Builder, x: str) -> Draft:
        code = builder.rng.choice(codes)
        text = code if "{out}" in code else "{out} = " + code
        return Draft(f"{kind}: {_in_one_line(code)}", text, (x,), smooth)

    return maker


def _linear(builder: Builder, x: str) -> Draft | None:
    value, rng = builder.values[x], builder.rng
    d, e = value.shape[-1], builder.width()
    bias = rng.random() < 0.7
    forms: list[tuple[str, Callable[[], str]]] = [
        ("nn.Linear", lambda: f"{builder.member(f'nn.Linear({d}, {e}, bias={bias})', 0.3)}({{0}})"),
        ("@", lambda: f"{{0}} @ {builder.parameter(d, e)}"),
        ("residual", lambda: f"{{0}} + {builder.member(f'nn.Linear({d}, {d})', 0.3)}({{0}})"),
        (
            "mlp",
            lambda: (
                f"{builder.member(f'nn.Linear({e}, {d})')}(F.gelu({builder.member(f'nn.Linear({d}, {e})')}({{0}})))"
            ),
        ),
        (
            "swiglu",
            lambda: (
                f"{builder.member(f'nn.Linear({e}, {d})')}(F.silu({builder.member(f'nn.Linear({d}, {e})')}({{0}})) * {builder.member(f'nn.Linear({d}, {e})')}({{0}}))"
            ),
        ),
        ("einsum", lambda: f"torch.einsum('...d,de->...e', {{0}}, {builder.parameter(d, e)})"),
        (
            "einsum transposed",
            lambda: f"torch.einsum('...d,ed->...e', {{0}}, {builder.parameter(e, d)})",
        ),
        ("tied", lambda: f"F.linear({{0}} @ {(w := builder.parameter(d, e))}, {w})"),
        (
            "Conv1D",
            lambda: (
                f"torch.addmm({builder.parameter(e)}, {{0}}.reshape(-1, {d}), {builder.parameter(d, e)}).view(*{{0}}.shape[:-1], {e})"
            ),
        ),
        ("mm", lambda: f"torch.mm({{0}}.reshape(-1, {d}), {builder.parameter(d, e)})"),
        (
            "lora",
            lambda: (
                f"{builder.member(f'nn.Linear({d}, {e})')}({{0}}) + {{0}} @ {builder.parameter(d, 4)} @ {builder.parameter(4, e)}"
            ),
        ),
        (
            "router",
            lambda: (
                f"{builder.member(f'nn.Linear({d}, {e})')}({{0}}) * {builder.member(f'nn.Linear({d}, 4)')}({{0}}.view(-1, {d})).softmax(-1)[:, :1].view(*{{0}}.shape[:-1], 1)"
            ),
        ),
        (
            "unit weight gradient",
            lambda: f"F.linear({{0}}, UnitGradient.apply({builder.parameter(e, d)}))",
        ),
        (
            "clipped weight gradient",
            lambda: f"F.linear({{0}}, ClippedGradient.apply({builder.parameter(e, d)}))",
        ),
        (
            "squared weight",
            lambda: f"F.linear({{0}}, {(w := builder.parameter(e, d))} * {w}.tanh())",
        ),
        (
            "weight norm",
            lambda: (
                f"F.linear({{0}}, F.normalize({builder.parameter(e, d)}, dim=-1) * {builder.parameter(e, 1)})"
            ),
        ),
        (
            "ternary weight",
            lambda: f"F.linear({{0}}, RoundThrough.apply({builder.parameter(e, d)}))",
        ),
        ("scale", lambda: f"{{0}} * {builder.parameter(d)} + {builder.parameter(d)}"),
    ]
    if value.dim() == 3:
        b = value.shape[1]
        forms += [
            ("bmm", lambda: f"torch.bmm({{0}}.transpose(0, 1), {builder.parameter(b, d, e)})"),
            (
                "baddbmm",
                lambda: (
                    f"torch.baddbmm({builder.parameter(b, 1, e)}, {{0}}.transpose(0, 1), {builder.parameter(b, d, e)})"
                ),
            ),
            (
                "experts einsum",
                lambda: f"torch.einsum('btd,tde->bte', {{0}}, {builder.parameter(b, d, e)})",
            ),
            ("mixing", lambda: f"torch.einsum('btd,st->bsd', {{0}}, {builder.parameter(b, b)})"),
        ]
    # half of them as the plainest
    name, form = forms[0] if rng.random() < 0.4 else rng.choice(forms)
    code = form()
    if name == "nn.Linear" and rng.random() < 0.1:
        weight = code.removesuffix("({0})")
        lines = f"{{out}} = {weight}.weight * 1.0\n{{out}}.register_hook(lambda g: g / (g.norm() + 1e-12))\n{{out}} = F.linear({{0}}, {{out}})"
        return Draft("linear: hook on weight", lines, (x,))
    return Draft(f"linear: {name}", "{out} = " + code, (x,))


def _norm(builder: Builder, x: str) -> Draft | None:
    value, rng = builder.values[x], builder.rng
    d = value.shape[-1]
    choices = [
        f"nn.LayerNorm({d})",
        f"nn.RMSNorm({d})",
        f"nn.LayerNorm({d}, elementwise_affine=False)",
    ]
    if value.dim() in (2, 3):
        choices += [f"nn.BatchNorm1d({value.shape[1]})"]
    if value.dim() >= 3:
        channels = value.shape[1]
        groups = rng.choice([g for g in (1, 2, 4, channels) if channels % g == 0])
        choices += [f"nn.GroupNorm({groups}, {channels})"] * 2
    if value.dim() == 3:
        choices += [f"nn.InstanceNorm1d({value.shape[1]}, affine=True)"]
    if value.dim() == 4:
        choices += [f"nn.BatchNorm2d({value.shape[1]})", f"nn.InstanceNorm2d({value.shape[1]})"]
    code = rng.choice(choices)
    # Torch's own GroupNorm on channels_last may crash the process where only its weights need
    # gradients.
    taken = "{0}.contiguous()" if "GroupNorm" in code else "{0}"
    return Draft("norm: " + code.split("(")[0], f"{{out}} = {builder.member(code)}({taken})", (x,))


def _convolution(builder: Builder, x: str) -> Draft | None:
    value, rng = builder.values[x], builder.rng
    if value.dim() not in (3, 4):
        return None
    channels, dims = value.shape[1], value.dim() - 2
    out = rng.choice([4, 8, 16, channels])
    groups = rng.choice([1, 1, channels if out % channels == 0 else 1])
    stride = rng.choice([1, 1, 2])
    kernel = rng.choice([1, 3])
    bias = rng.random() < 0.6
    kind = f"Conv{dims}d" if rng.random() < 0.85 else f"ConvTranspose{dims}d"
    code = f"nn.{kind}({channels}, {out}, {kernel}, padding={kernel // 2}, stride={stride}, groups={groups}, bias={bias})"
    taken = "{0}"
    if dims == 2 and rng.random() < 0.3:
        taken = "{0}.contiguous(memory_format=torch.channels_last)"
    name = f"conv: {kind}" + (" grouped" if groups > 1 else "")
    return Draft(name, f"{{out}} = {builder.member(code)}({taken})", (x,))


_ATTENTION_MASKS = {
    "causal": "is_causal=True",
    "none": "",
    "float mask": "attn_mask=causal({q} @ {k}.mT, {fill})",
    "bool mask": "attn_mask=causal({q} @ {k}.mT, 1.0) == 0",
}


def _attention(builder: Builder, x: str) -> Draft | None:
    """Multi-head attention, by the operator or as written out, with some mask."""
    value, rng = builder.values[x], builder.rng
    if value.dim() != 3:
        return None
    d = value.shape[-1]
    heads = rng.choice([h for h in (1, 2, 4) if d % h == 0])
    grouped = heads > 1 and rng.random() < 0.2
    kv = 1 if grouped else heads
    size = d // heads
    q, k, v = (
        builder.member(f"nn.Linear({d}, {size * h}, bias={rng.random() < 0.3})", 0)
        for h in (heads, kv, kv)
    )
    split = [
        f"{m}({{0}}).unflatten(-1, ({h}, {size})).transpose(1, 2)"
        for m, h in ((q, heads), (k, kv), (v, kv))
    ]
    names = ["{out}_q", "{out}_k", "{out}_v"]
    lines = [f"{name} = {code}" for name, code in zip(names, split, strict=True)]
    fill = rng.choice(["torch.finfo({out}_q.dtype).min", "-1e4", "float('-inf')", "-3.0"])
    form = rng.choice([*_ATTENTION_MASKS, "eager", "eager", "sink", "masked_fill"])
    smooth = form in ("causal", "none")
    if form in _ATTENTION_MASKS:
        mask = (
            _ATTENTION_MASKS[form]
            .replace("{q}", names[0])
            .replace("{k}", names[1])
            .replace("{fill}", fill)
        )
        arguments = [*names, *([mask] if mask else []), *(["enable_gqa=True"] if grouped else [])]
        lines.append(f"{{out}} = F.scaled_dot_product_attention({', '.join(arguments)})")
        kind = f"sdpa: {form}" + (" grouped" if grouped else "")
    else:
        lines.append("{out}_s = {out}_q @ {out}_k.mT * " + f"{rng.choice([6.0, 1.0, size**-0.5])}")
        if form == "masked_fill":
            lines.append("{out}_s = {out}_s.masked_fill(causal({out}_s, 1.0) > 0, " + fill + ")")
        else:
            lines.append("{out}_s = {out}_s + causal({out}_s, " + fill + ")")
        if form == "sink":
            sink = builder.member(f"nn.Parameter(torch.zeros({heads}))", 0)
            lines.append(
                f"{{out}}_s = torch.cat([{{out}}_s, {sink}.view(1, -1, 1, 1).expand(len({{out}}_s), -1, {{out}}_s.shape[2], 1)], -1)"
            )
            largest = rng.choice(["amax(-1, keepdim=True)", "max(-1, keepdim=True).values"])
            lines.append(f"{{out}}_s = {{out}}_s - {{out}}_s.{largest}")
            lines.append("{out} = {out}_s.softmax(-1)[..., :-1] @ {out}_v")
        else:
            precise = ", dtype=torch.float32).to({out}_v.dtype" if rng.random() < 0.5 else ""
            lines.append("{out} = {out}_s.softmax(-1" + precise + ") @ {out}_v")
        kind = f"attention: {form} {fill.replace('{out}_q.', '')}"
    lines.append("{out} = {out}.transpose(1, 2).flatten(2)")
    if rng.random() < 0.7:
        lines.append(f"{{out}} = {builder.member(f'nn.Linear({d}, {d})', 0)}({{out}})")
    return Draft(kind, "\n".join(lines), (x,), smooth)


def _distances(builder: Builder, x: str) -> Draft | None:
    value = builder.values[x]
    if value.dim() != 3:
        return None
    points = f"{builder.member(f'nn.Linear({value.shape[-1]}, 3)')}({{0}})"
    code = builder.rng.choice(
        [
            "{out} = (({out}[:, :, None] - {out}[:, None]).square().sum(-1) + 1e-12).sqrt()",
            "{out} = torch.cdist({out}, {out} + 0.3)",
            "{out} = ({out}[:, :, None] - {out}[:, None]).norm(dim=-1)",
            "{out} = F.cosine_similarity({out}[:, :, None], {out}[:, None] + 0.1, dim=-1)",
        ]
    )
    return Draft("singular: " + _in_one_line(code), f"{{out}} = {points}\n{code}", (x,), False)


def _gated(builder: Builder, x: str) -> Draft | None:
    value = builder.values[x]
    d = value.shape[-1]
    choices = [
        ("glu", "F.glu({0}, -1)", (x,)),
        ("prelu", f"F.prelu({{0}}, {builder.parameter(1)})", (x,)),
        ("product", "{0} * {1}", (x, builder.like(x))),
        ("gate", "{0} * torch.sigmoid({1})", (x, builder.like(x))),
        ("sum", "{0} + {1} * 0.5", (x, builder.like(x))),
        ("quotient", "{0} / ({1}.abs() + 0.5)", (x, builder.like(x))),
        ("learned step", f"{builder.member('Step(0.1)')}({{0}})", (x,)),
        ("gram", "{0} @ {1}.mT / " + str(d**0.5), (x, builder.like(x))),
        ("cat", "torch.cat([{0}, {1}], -1)", (x, builder.like(x))),
        ("stack", "torch.stack([{0}, {1}], 1).flatten(1, 2)", (x, builder.like(x))),
        ("where", "torch.where({0} > {1}.mean(), {0}, {1})", (x, builder.like(x))),
        ("lerp", "torch.lerp({0}, {1}, 0.3)", (x, builder.like(x))),
        ("addcmul", "torch.addcmul({0}, {0}, {1}, value=0.5)", (x, builder.like(x))),
        ("dist", "torch.hypot({0}, {1} + 0.1)", (x, builder.like(x))),
    ]
    name, code, args = builder.rng.choice(choices)
    rough = name in ("learned step", "quotient", "dist", "where", "prelu")
    return Draft(f"pair: {name}", "{out} = " + code, args, not rough)


def _checkpointed(builder: Builder, x: str) -> Draft | None:
    inner = builder.rng.choice([_linear, _norm, _table("activation", ACTIVATIONS, smooth=True)])
    draft = inner(builder, x)
    if draft is None or len(draft.args) != 1 or "\n" in draft.code:
        return None
    body = draft.code.removeprefix("{out} = ").replace("{0}", "a")
    second = builder.rng.choice(["F.gelu", "torch.tanh", "torch.relu"])
    return Draft(
        f"checkpoint: {draft.kind}",
        f"{{out}} = checkpoint(lambda a: {second}({body}), {{0}}, use_reentrant=False)",
        (x,),
        draft.smooth,
    )


def _dropout(builder: Builder, x: str) -> Draft | None:
    return Draft("dropout", f"{{out}} = F.dropout({{0}}, {builder.rng.choice([0.1, 0.5])})", (x,))


def _embedding(builder: Builder, x: str) -> Draft | None:
    del x
    if not builder.tokens:
        return None
    name = builder.rng.choice(list(builder.tokens))
    code = f"nn.Embedding({builder.tokens[name]}, {builder.width()})"
    return Draft("embedding", f"{{out}} = {builder.member(code)}({{0}})", (name,))


# how often each is tried
MAKERS: Mapping[Maker, int] = {
    _linear: 30,
    _norm: 9,
    _convolution: 9,
    _attention: 9,
    _table("activation", ACTIVATIONS, smooth=True): 10,
    _table("activation", KINKED, smooth=False): 4,
    _table("singular", SINGULAR, smooth=False): 7,
    _table("rounding", ROUNDING, smooth=False): 4,
    _table("mask", MASKS, smooth=False): 5,
    _table("integer", INTEGER, smooth=False): 4,
    _table("view", VIEWS, smooth=True): 9,
    _table("reduction", REDUCTIONS, smooth=True): 5,
    _table("complex", COMPLEX, smooth=False): 3,
    _table("in place", IN_PLACE, smooth=True): 4,
    _table("gradient", GRADIENTS, smooth=False): 4,
    _gated: 8,
    _distances: 2,
    _checkpointed: 4,
    _dropout: 2,
    _embedding: 3,
}


def final_linear(builder: Builder, x: str) -> Draft | None:
    """A linear layer, for the end of a program: nothing after the last parameter is encoded."""
    d, e = builder.values[x].shape[-1], builder.rng.choice([4, 16, 32])
    return Draft(
        "linear: nn.Linear", f"{{out}} = {builder.member(f'nn.Linear({d}, {e})')}({{0}})", (x,)
    )


def loss(builder: Builder, x: str) -> Draft | None:
    """A loss of logits, reduced or of each token."""
    value = builder.values[x]
    classes = value.shape[-1]
    if classes < 2:
        return None
    target = "(torch.arange({0}[..., 0].numel()).view({0}.shape[:-1]) % " + f"{classes})"
    flat = f"{{0}}.reshape(-1, {classes}), {target}.reshape(-1)"
    choices = {
        "token log-probabilities": f"{{0}}.log_softmax(-1).gather(-1, {target}.unsqueeze(-1)).squeeze(-1)",
        "cross entropy": f"F.cross_entropy({flat})",
        "cross entropy of each token": f"F.cross_entropy({flat}, reduction='none').view({{0}}.shape[:-1])",
        "mse": "F.mse_loss({0}, torch.zeros_like({0}) + 0.3)",
        "huber": "F.smooth_l1_loss({0}, torch.zeros_like({0}) + 0.3, reduction='none')",
        "square of each token": "{0}.square().mean(-1)",
        "kl": "F.kl_div({0}.log_softmax(-1), torch.full_like({0}, "
        + f"{1 / classes}), reduction='batchmean')",
    }
    name = builder.rng.choice(list(choices))
    return Draft(f"loss: {name}", "{out} = " + choices[name], (x,))
