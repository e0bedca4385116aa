"""The linear modules of a model, and which of them an adapter cannot, or should not, change.

What a module does is observed in one pass over a few tokens, not guessed from its name: a module
that is never called would not be trained on text, and one whose weight is used without calling it
would ignore its adapter.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers.pytorch_utils import Conv1D

from fedmomentum.lora.peft_names import (
    default_targets,
    is_forbidden,
    names_of_experts,
    renamed_on_loading,
)
from fedmomentum.utils.modules import compute_logits, is_plain_linear
from fedmomentum.utils.quantized import quantized_layers, weight_shape

# Reasons why a module is adapted only if named explicitly, or not at all.
HEAD = "the output head"
ROUTER = "routes tokens to experts"
UNUSED = "not used on text"
UNTRAINED = "its result reaches the logits without a gradient"
NOT_LINEAR = "computes something else than a linear layer"
BYPASSED = (
    "the model uses its weight without calling the module, so an adapter would have no effect"
)
TIED = "shares its weight with another module"
EXPERT_NAME = (
    "PEFT takes its name for that of the experts' weights; it can be adapted by the path of its "
    "weight in target-parameters"
)
RENAMED = "PEFT would read its adapter back under another name"
FORBIDDEN = "PEFT does not adapt it in this architecture"
# Reasons that mean an adapter would never be trained.
IDLE = (UNUSED, UNTRAINED)
# Reasons that no setting can override.
REFUSED = (NOT_LINEAR, BYPASSED, TIED, EXPERT_NAME, RENAMED, FORBIDDEN)

NUM_TOKENS = 8
# Ordinary tokens have small ids; special ones tend to have large ones.
MAX_TOKEN_ID = 1000
# Common names of the module that routes tokens to experts; matched against every part of a path.
ROUTER_NAMES = re.compile(r"(\w*router|gate|shared_experts?_gate|expert_gate|gate_\w*weights?)")
# Experts in a list of modules: tokens reach only a few, so not being called means little.
_EXPERT = re.compile(r"(^|\.)\w*experts?\.\d+\.")


@dataclass(frozen=True)
class LinearModules:
    """The linear modules of a model.

    Attributes:
        kind: The name of the model's class.
        sizes: Path of each linear module to the smaller side of its weight.
        reasons: Path to the reason, for each module that is left out.
        others: Path to kind, for modules and parameters that hold weights but are not linear.
        embeddings: Paths of the embeddings among the others, which can be adapted by name.
        parameters: Paths of all parameters that are matrices or stacks of them.
        quantized: Paths of the linear modules whose weights are quantized.
        default: PEFT's target modules for this architecture: names, an expression, or None.
    """

    kind: str
    sizes: Mapping[str, int]
    reasons: Mapping[str, str]
    others: Mapping[str, str]
    embeddings: tuple[str, ...]
    parameters: tuple[str, ...]
    quantized: frozenset[str]
    default: list[str] | str | None


def find_linear_modules(model: nn.Module) -> LinearModules:
    """Return the linear modules of a model without adapters; runs it once on a few tokens."""
    linear = {}
    others = {}
    for path, module in model.named_modules():
        if isinstance(module, (nn.Linear, Conv1D)):
            linear[path] = module
            continue
        for name, parameter in module.named_parameters(prefix=path, recurse=False):
            is_table = name.endswith(".weight") and parameter.ndim > 1
            if is_table:
                others[path] = type(module).__name__
            elif parameter.ndim > 2:
                others[name] = f"parameter of shape {tuple(parameter.shape)}"
    return LinearModules(
        kind=type(model).__name__,
        sizes={path: min(weight_shape(module)) for path, module in linear.items()},
        reasons=_find_reasons(model, linear),
        others=others,
        embeddings=tuple(p for p, m in model.named_modules() if isinstance(m, nn.Embedding)),
        parameters=tuple(p for p, tensor in model.named_parameters() if tensor.ndim > 1),
        quantized=frozenset(path for path, _ in quantized_layers(model)),
        default=default_targets(model),
    )


def _find_reasons(model: nn.Module, linear: Mapping[str, Any]) -> dict[str, str]:
    """Return why modules are left out; if several reasons apply, the strongest one."""
    seen = _observe(model, linear)
    tied = _shared_weights(model)
    taken = names_of_experts(model, linear)
    heads = _heads(model)
    has_experts = any("expert" in name for name, _ in model.named_parameters())
    leaves = {path.rpartition(".")[2] for path in linear}
    forbidden = {leaf for leaf in leaves if is_forbidden(model, leaf)}
    reasons = {}
    for path, module in linear.items():
        leaf = path.rpartition(".")[2]
        owner: Any = type(model.get_submodule(path.rpartition(".")[0]))
        if module in heads:
            reasons[path] = HEAD
        elif id(module.weight) in tied:
            reasons[path] = TIED
        elif path in seen.bypassed or _may_bypass(owner, leaf):
            reasons[path] = BYPASSED
        elif not is_plain_linear(module):
            reasons[path] = NOT_LINEAR
        elif path not in seen.called and not _EXPERT.search(path):
            reasons[path] = UNUSED
        elif path in seen.called and path not in seen.trained:
            reasons[path] = UNTRAINED
        elif leaf in taken:
            reasons[path] = EXPERT_NAME
        elif has_experts and _routes(path):
            reasons[path] = ROUTER
        elif leaf in forbidden:
            reasons[path] = FORBIDDEN
    kept = [path for path in linear if reasons.get(path) not in REFUSED]
    return reasons | dict.fromkeys(renamed_on_loading(model, kept), RENAMED)


# ── what the model does ───────────────────────────────────────────────────────────────────────────


class _WeightUse(TorchFunctionMode):
    """Record weights that are used while their module is not being called."""

    def __init__(self, paths: Mapping[int, str]) -> None:
        super().__init__()
        self._paths = paths  # of each weight, by its id
        self.running: set[str] = set()
        self.bypassed: set[str] = set()

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run a torch function, and look for weights among its arguments."""
        result = function(*args, **(kwargs or {}))
        # Reading a weight's dtype or device does not count as using it.
        if isinstance(result, Tensor):
            for argument in [*args, *(kwargs or {}).values()]:
                path = self._paths.get(id(argument))
                if path is not None and path not in self.running:
                    self.bypassed.add(path)
        return result


@dataclass(frozen=True)
class _Observation:
    """What a pass over a few tokens reveals about linear modules.

    Attributes:
        called: Those that were called.
        trained: Those whose output reaches the logits with a gradient.
        bypassed: Those whose weight was used without a call.
    """

    called: set[str]
    trained: set[str]
    bypassed: set[str]


def _observe(model: Any, linear: Mapping[str, Any]) -> _Observation:
    """Run the model on a few tokens."""
    if not type(model).__module__.startswith("transformers."):
        # A user's class, whose inputs are unknown.
        return _Observation(set(linear), set(linear), set())
    tied = _shared_weights(model)
    paths = {id(module.weight): path for path, module in linear.items()}
    uses = _WeightUse({key: path for key, path in paths.items() if key not in tied})
    tokens = torch.arange(NUM_TOKENS) * 7 % min(_vocabulary_size(model), MAX_TOKEN_ID)
    nodes: dict[str, list[Any]] = {}
    with ExitStack() as stack:
        for path, module in linear.items():
            stack.enter_context(_watched(path, module, nodes, uses.running))
        stack.enter_context(_eval_mode(model))
        stack.enter_context(_gradients_from_embeddings(model))
        stack.enter_context(uses)
        logits = compute_logits(model, tokens[None])
    return _Observation(set(nodes), _reaching(logits, nodes), uses.bypassed)


@contextmanager
def _gradients_from_embeddings(model: Any) -> Iterator[None]:
    """Enable gradients from the embeddings on, whether or not weights are frozen."""

    def with_gradient(_: nn.Module, __: Any, output: Any) -> Any:
        # The product is not a leaf, so the model may modify it in place.
        return output.detach().requires_grad_() * 1 if isinstance(output, Tensor) else output

    try:
        handle = model.get_input_embeddings().register_forward_hook(with_gradient)
    except (AttributeError, NotImplementedError):
        handle = None
    try:
        with torch.enable_grad():
            yield
    finally:
        if handle is not None:
            handle.remove()


def _reaching(logits: Tensor, nodes: Mapping[str, list[Any]]) -> set[str]:
    """Return the modules with an output among the ancestors of the logits."""
    if logits.grad_fn is None:
        return set(nodes)
    ancestors = set()
    pending: list[Any] = [logits.grad_fn]
    while pending:
        node = pending.pop()
        if node is not None and node not in ancestors:
            ancestors.add(node)
            pending += [parent for parent, _ in node.next_functions]
    return {path for path, results in nodes.items() if any(n in ancestors for n in results)}


@cache
def _may_bypass(owner: type, leaf: str) -> bool:
    """Return whether a class's forward can pass the weight of one of its modules to a kernel.

    Mixers of state-space models do so on a GPU, or if faster kernels are installed, so a single
    pass on this machine may not reveal it.
    """
    # Skip code that only checks the weight's type.
    passed = re.compile(rf"(?<!isinstance\()self\.{re.escape(leaf)}\.weight[,)]")
    for name, function in inspect.getmembers(owner, inspect.isfunction):
        if "forward" not in name or not function.__module__.startswith("transformers."):
            continue
        try:
            source = inspect.getsource(function)
        except OSError:  # an installation without sources
            continue
        if passed.search(re.sub(r"\s+", "", source)):
            return True
    return False


@contextmanager
def _watched(
    path: str, module: nn.Module, nodes: dict[str, list[Any]], running: set[str]
) -> Iterator[None]:
    """Within the block, record the autograd nodes of a module's outputs, and when it is running."""

    def begin(*_: Any) -> None:
        running.add(path)

    def end(_: nn.Module, __: Any, output: Any) -> None:
        running.discard(path)
        outputs = output if isinstance(output, tuple) else (output,)
        results = [part.grad_fn for part in outputs if isinstance(part, Tensor)]
        nodes.setdefault(path, []).extend(results)

    handles = [module.register_forward_pre_hook(begin), module.register_forward_hook(end)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, was_training in training.items():
            module.training = was_training


def _vocabulary_size(model: Any) -> int:
    try:
        return int(model.get_input_embeddings().weight.shape[0])
    except (AttributeError, NotImplementedError, TypeError):
        return 2


# ── what the model is ─────────────────────────────────────────────────────────────────────────────


def _shared_weights(model: nn.Module) -> set[int]:
    """Return the ids of weights that occur more than once, through tying or a reused module."""
    seen: set[int] = set()
    shared: set[int] = set()
    for _, parameter in model.named_parameters(remove_duplicate=False):
        (shared if id(parameter) in seen else seen).add(id(parameter))
    return shared


def _heads(model: Any) -> list[nn.Module]:
    """Return the module that turns hidden states into vocabulary logits, if there is one."""
    try:
        head = model.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        return []
    return [] if head is None else [head]


def _routes(path: str) -> bool:
    """Return whether a module of a model with experts is a router, or part of one."""
    return any(ROUTER_NAMES.fullmatch(name) for name in path.split("."))
