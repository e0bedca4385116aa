"""Every hook of a `Callback` reaches every callback of a list, in order and with its arguments."""

import inspect

import pytest

from fedmomentum.server.callbacks import Callback, CallbackList

HOOKS = [name for name in vars(Callback) if name.startswith("on_")]


@pytest.mark.parametrize("hook", HOOKS)
def test_a_list_passes_every_hook_on(hook):
    calls = []

    class Recorder(Callback):
        def __init__(self, name):
            self.name = name

    setattr(Recorder, hook, lambda self, *arguments: calls.append((self.name, arguments)))
    arguments = tuple(range(len(inspect.signature(getattr(Callback, hook)).parameters) - 1))
    nested = CallbackList([Recorder("first"), CallbackList([Recorder("second")])])
    getattr(nested, hook)(*arguments)
    assert calls == [("first", arguments), ("second", arguments)]


def test_every_hook_of_callback_is_found():
    assert "on_round_end" in HOOKS and len(HOOKS) == 13
