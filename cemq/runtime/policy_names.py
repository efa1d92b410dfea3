"""Policies by name and settings: as the command line gives them, and as bundles keep them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import cemq.runtime.dicache  # these register themselves
import cemq.runtime.duca
import cemq.runtime.easycache
import cemq.runtime.h2cache
import cemq.runtime.magcache
import cemq.runtime.precisecache
import cemq.runtime.sencache
import cemq.runtime.teacache  # noqa: F401
from cemq.errors import InputError, choose
from cemq.runtime.policies import POLICIES, Policy


def known_policies() -> dict[str, type[Policy]]:
    """All that are registered, those of this package among them."""
    return POLICIES  # importing this module has registered them


def make_policy(name: str, settings: Mapping[str, Any]) -> Policy:
    """A registered policy with these settings. Raises InputError for what it does not take."""
    kind = known_policies()[choose("policy", name, known_policies())]
    assert dataclasses.is_dataclass(kind)  # nothing else can be registered
    fields = dataclasses.fields(kind)
    for key in settings:
        choose(f"setting of policy {name}", key, [field.name for field in fields])
    for field in fields:
        if field.name not in settings and field.default is field.default_factory is dataclasses.MISSING:
            raise InputError(f"policy {name} needs {field.name}: write {name}:{field.name}=...")
    try:
        return kind(**{key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()})
    except TypeError as error:
        raise InputError(f"policy {name}: {error}") from None


def parse_policy(text: str) -> Policy:
    """A policy from ``NAME:KEY=VALUE,KEY=VALUE``; lists are written ``1.0;0.5``.

    Raises:
        InputError: There is no such policy, or it does not take these settings.
    """
    name, _, rest = text.partition(":")
    settings: dict[str, Any] = {}
    for pair in filter(None, rest.split(",")):
        key, equals, value = pair.partition("=")
        if not equals:
            raise InputError(f"policy {text!r}: write NAME:KEY=VALUE, e.g. teacache:threshold=0.2")
        values = [_value(each) for each in value.split(";")]
        settings[key.strip()] = values[0] if len(values) == 1 else values
    return make_policy(name, settings)


def _value(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def describe_policy(policy: Policy) -> dict[str, Any]:
    """What `make_policy` makes it of again; JSON can hold it."""
    assert dataclasses.is_dataclass(policy)
    return {"name": policy.name, "settings": json.loads(json.dumps(dataclasses.asdict(policy)))}
