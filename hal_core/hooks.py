"""The hooks of a plugin and what they return. An entry point of the group `hal.plugins` names a light module with
them.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import attrs
import pluggy

from .decision import Candidate, Decision, Policy, PolicyChoice
from .device_info import Record
from .request import AttentionRequest

#: (major, minor) of the plugin contract. A plugin needs the same major, and a minor that is not newer.
API_VERSION = (1, 1)
ENTRY_POINT_GROUP = "hal.plugins"

hookspec = pluggy.HookspecMarker("hal")
hookimpl = pluggy.HookimplMarker("hal")


@attrs.frozen(kw_only=True, eq=False, repr=False, slots=False)
class BackendSpec(Record):
    """A backend's metadata: enough to list it without importing it.

    Attributes:
        name: the backend's name, the first part of its device ids.
        target: "module:attr" of a class built without arguments; imported when the backend is first needed.
        api: the plugin contract it was written for.
        requirements: what it needs beside its package, for people ("a Vulkan 1.3 driver").
        install_hint: what to type where something is missing.
        priority: order among equals, higher first.
    """

    name: str = attrs.field(validator=attrs.validators.matches_re(r"[a-z][a-z0-9_]*"))
    target: str = attrs.field(validator=attrs.validators.matches_re(r"[\w.]+:[\w.]+"))
    api: tuple[int, int] = API_VERSION
    requirements: tuple[str, ...] = ()
    install_hint: str = attrs.field(default="", validator=attrs.validators.instance_of(str))
    priority: int = attrs.field(default=0, validator=attrs.validators.instance_of(int))


class KernelSpec(NamedTuple):
    """What the name of a kernel beside attention means. Every provider of the name is held to its reference.

    Attributes:
        name: for example "matmul".
        signature: the call as text, "matmul(a[M, K], b[K, N]) -> [M, N]".
        reference: "module:attr" of a float64 implementation on torch tensors.
        sampler: "module:attr" of a function (generator) -> argument tuple that draws fresh inputs.
        tolerance: largest ||x - reference|| / ||reference|| by dtype name.
    """

    name: str
    signature: str
    reference: str
    sampler: str
    tolerance: Mapping[str, float]


class Table(NamedTuple):
    """A table that a command prints.

    Attributes:
        title: a heading; "" for none. columns: the names of the columns.
        rows: one sequence of texts per row, as many as there are columns. notes: sentences below the table.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()


class CommandResult(NamedTuple):
    """What a command returns: it never prints.

    Attributes:
        data: what `--json` prints: dicts, lists, texts, numbers, booleans and None.
        tables, text: what is printed without `--json`: the tables, and then the sentences.
        exit_code: 0 for success, 1 where a check failed.
    """

    data: Any
    tables: Sequence[Table] = ()
    text: Sequence[str] = ()
    exit_code: int = 0


class Hooks:
    """Signatures of the hooks; an implementation may take fewer arguments."""

    @hookspec
    def hal_backends(self, api_version: tuple[int, int]) -> list[BackendSpec]:  # type: ignore[empty-body]
        """The backends this plugin offers."""

    @hookspec
    def hal_kernels(self) -> list[KernelSpec]:  # type: ignore[empty-body]
        """Specifications of this plugin's own kernels beside attention."""

    @hookspec(firstresult=True)
    def hal_policy(
        self, request: AttentionRequest, candidates: list[Candidate], policy: Policy
    ) -> str | PolicyChoice | None:
        """The device to use among candidates that support the request; None leaves it to the next policy. `policy` says
        what the caller asked for: the objective, and the names among which it leaves the choice.
        """

    @hookspec
    def hal_decision(self, decision: Decision) -> None:
        """Called with every new decision. Observers cannot change it."""

    @hookspec
    def hal_call(self, decision: Decision, seconds: float, operands: tuple[Any, ...] | None) -> None:
        """Called after attention ran, with its duration: the host's time until the result was ready on the host, or the
        device's own time where the session reports it later from events. `operands` begin with query and key, whose
        lengths are the call's own where the decision holds those of its bucket; None where the time comes later.
        Observers cannot change the result, and keep no tensor.
        """

    @hookspec
    def hal_error(self, decision: Decision, error: Exception) -> None:
        """Called after the session that a decision chose raised `error`, which its caller gets."""

    @hookspec
    def hal_doctor(self) -> list[Table]:  # type: ignore[empty-body]
        """Tables that `hal doctor` adds: what is wrong now, and what to do."""

    @hookspec
    def hal_commands(self, subparsers: Any) -> None:
        """Add subcommands to `hal`.

        `subparsers` is what argparse's `add_subparsers` returned. Each command calls `set_defaults(run=f)`, where
        `f(args) -> CommandResult`; `--json` is added to every command by hal-cli, and `args.progress(text, share)`
        shows the progress of long work.
        """
