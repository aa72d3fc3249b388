"""Reading options: ours and Inductor's, from the same mapping."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from prac_fx.config import PracConfig
from prac_fx.environment import OPTIONS, options_of_environment
from prac_fx.errors import PracOptionError
from prac_fx.option_checks import PREFIX, near_miss
from prac_fx.torch_compat import inductor_config, inductor_patches


def split_options(options: Mapping[str, Any] | None) -> tuple[PracConfig, dict[str, Any]]:
    """Split the `options` of `torch.compile` into our configuration and Inductor's.

    What the options do not say PRAC_FX_OPTIONS may say.

    Returns:
        The configuration from the `prac.*` keys, and the remaining keys, checked against
        Inductor's.

    Raises:
        PracOptionError: an unknown key (with the nearest known key), or an ill-typed or
            contradictory value.
    """
    given = options_of_environment()
    if given:
        try:
            _split(given)
        except PracOptionError as error:
            raise PracOptionError(f"{OPTIONS}: {error}") from None
    return _split({**given, **(options or {})})


def _split(options: Mapping[str, Any]) -> tuple[PracConfig, dict[str, Any]]:
    fields = {field.name for field in dataclasses.fields(PracConfig)}
    ours: dict[str, Any] = {}
    inductor: dict[str, Any] = {}
    for key, value in options.items():
        if not isinstance(key, str):
            raise PracOptionError(f"options: keys are text, got {key!r}")
        name = key.replace("-", "_")
        if name.startswith(PREFIX):
            field = name[len(PREFIX) :]
            if field not in fields:
                known = sorted(PREFIX + known for known in fields)
                raise PracOptionError(
                    f"unknown option {key!r}{near_miss(name, known)}; known are {', '.join(known)}"
                )
            ours[field] = value
        else:
            inductor[_inductor_key(key, name, fields)] = value
    return PracConfig(**ours), inductor


def config_patches(mode: str | None, options: Mapping[str, Any]) -> dict[str, Any]:
    """Inductor's config patches for a mode and for options that `split_options` has checked.

    Raises:
        PracOptionError: unknown mode, or a value of the wrong type.
    """
    try:
        return inductor_patches(mode, options)
    except RuntimeError as error:
        raise PracOptionError(f"options: {error}") from None


def read_options(
    options: Mapping[str, Any] | PracConfig | None,
) -> tuple[PracConfig, dict[str, Any]]:
    """Our configuration and Inductor's config patches, from options in either form.

    Raises:
        PracOptionError: as `split_options` and `config_patches`.
    """
    if isinstance(options, PracConfig):
        return options, {}
    config, inductor_options = split_options(options)
    return config, config_patches(None, inductor_options)


def _inductor_key(key: str, name: str, fields: set[str]) -> str:
    known = inductor_config.get_config_copy()
    if name == "custom_partitioner_fn":
        raise PracOptionError(
            'options: "custom_partitioner_fn" contradicts backend="prac", which is a partitioner '
            "itself"
        )
    if name not in known:
        if name in fields or name == "prac":
            raise PracOptionError(f"unknown option {key!r}: did you mean {PREFIX + name!r}?")
        raise PracOptionError(
            f"unknown option {key!r}: neither a prac.* option nor one of Inductor's"
            f"{near_miss(name, [*known, *(PREFIX + field for field in fields)])}"
        )
    return name
