"""Which settings a model writes with: its own, as they can be saved, or none but the most likely token."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any

from rayft.tasks.later import transformers

ENDS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")


def saveable(network: Any) -> None:
    """Mends settings of a generating model that `save_pretrained` would refuse, as their author seems to mean them.

    Transformers 5.23 loads them with a warning, and refuses to save them once anything in them has changed. Where
    `do_sample` is left out, values that only sampling uses ask for it, but for a temperature of 0; what is unfit
    otherwise has had no effect, and is unset.
    """
    settings = getattr(network, "generation_config", None)
    if settings is None or not (unfit := _unfit(settings)):
        return
    if settings.do_sample is None and settings.temperature != 0:
        settings.do_sample = True
        if _unfit(settings) == unfit:
            settings.do_sample = None
    for name in _unfit(settings):
        setattr(settings, name, None)


def _unfit(settings: Any) -> list[str]:
    """Names of the values that don't go with the others."""
    try:
        settings.validate(strict=True)
    except ValueError as fault:
        return re.findall(r"^- `(\w+)`: ", str(fault), re.MULTILINE)
    return []


@contextlib.contextmanager
def greedy(network: Any) -> Iterator[Any]:
    """The network within adapters; of its own settings only `ENDS` hold here, and the most likely token is written.

    What a call of `generate` leaves out is taken from the model's settings, penalties for repetition and forbidden
    words too, and not all of them have a value that stands for none.
    """
    network = getattr(network, "get_base_model", lambda: network)()
    own = network.generation_config
    ends = {name: getattr(own, name) for name in ENDS}
    network.generation_config = transformers.GenerationConfig(do_sample=False, num_beams=1, use_cache=True, **ends)
    try:
        yield network
    finally:
        network.generation_config = own
