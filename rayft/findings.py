"""How what a check found reads as plain text."""

from __future__ import annotations

from rayft.tasks.cells import short
from rayft.text import Json, aligned, amount, counted, duration, number, size

_STATES = {
    "new": "new",
    "resumed": "begun before; it would go on from its last checkpoint",
    "longer": "begun before; it would go on for longer than was asked then",
    "finished": "finished; running it again would only show its result",
}
_SHOWN = 12  # labels that are listed one by one


def check_lines(report: Json) -> list[str]:
    """What preflight.check found: the run, its rows, its labels, its memory, and what is wrong."""
    lines = [report["run"]["folder"], *aligned(_check_facts(report))]
    if report["data"]:
        lines += ["", *_split_lines(report["data"]), *_balance_lines(report["data"])]
    if report["memory"]:
        lines += ["", *_memory_lines(report["memory"])]
    if report["sweep"]:
        lines += ["", *_sweep_forecast(report["sweep"])]
    if report["storage"]["prepared"]:
        lines += ["", f"the prepared rows are kept for the run, in {report['storage']['prepared']}"]
    lines += [f"warning: {sentence}" for sentence in report["warnings"]]
    faults = report["faults"]
    lines += ["", f"{counted(len(faults), 'fault')}:" if faults else "nothing is wrong; no training was started"]
    return lines + ["  " + fault.replace("\n", "\n    ") for fault in faults]


def _check_facts(report: Json) -> list[tuple[str, str]]:
    found = [("run", _STATES.get(report["run"]["state"], "refused"))]
    found.append(("storage", "can be written" if report["storage"]["writable"] else "can't be written"))
    cluster, model, steps = report["cluster"], report["parameters"], report["steps"]
    if cluster:
        have = f"{counted(cluster['machines'], 'machine')} with {counted(cluster['cpus'], 'CPU')}"
        each = counted(cluster["cpus_per_worker"], "CPU")
        if cluster["gpus"] or cluster["gpus_per_worker"]:
            have += f" and {counted(cluster['gpus'], 'GPU')}"
            each += f" and {counted(cluster['gpus_per_worker'], 'GPU')}"
        found.append(("cluster", f"{have}; {counted(cluster['workers'], 'worker')} with {each} each"))
    if model:
        most = model["trainable_at_end"]
        later = f", {amount(most)} at the end" if most != model["trainable"] else ""
        what = f"{amount(model['trainable'])} to train{later}, {amount(model['frozen'])} frozen"
        found.append(("parameters", f"{amount(model['total'])}: {what}"))
    if steps:
        found.append(("steps", f"{steps['total']:,}, {steps['per_epoch']:,} an epoch"))
        each = f"{counted(steps['rows_per_worker'], 'row')} a worker"
        pieces = counted(steps["micro_batches"], "micro-batch", "es")
        found.append(("global batch", f"{counted(steps['global_batch_size'], 'row')}: {each} in {pieces}"))
    return found


def _split_lines(data: Json) -> list[str]:
    """A table of the splits, and why rows were left out."""
    rows: list[tuple[str, ...]] = [
        ("data", "rows", "bad", "dropped", "truncated", "prepared", "median", "95 %", "longest", "limit")
    ]
    below = []
    for name, split in data.items():
        lengths = split["lengths"]
        left_out = (split["bad"]["count"], sum(split["dropped"].values()), split["truncated"], split["prepared"])
        sizes = [f"<= {lengths['median']:,}", f"<= {lengths['p95']:,}"]
        sizes += [number(lengths["longest"]), number(lengths["limit"])]
        head = name + (" (cut from train)" if split["cut"] else "")
        rows.append((head, number(split["rows"]), *map(number, left_out), *sizes))
        below += [f"  {name}: {number(count)} dropped: {reason}" for reason, count in split["dropped"].items()]
        below += [f"  {name}: bad: {example}" for example in split["bad"]["examples"]]
    return aligned(rows, right=range(1, len(rows[0]))) + below


def _balance_lines(data: Json) -> list[str]:
    """How often which label occurs in which split; of many labels the rarest and the most frequent."""
    splits = {name: split["balance"] for name, split in data.items() if split["balance"]}
    if not splits:
        return []
    totals = {name: sum(counts.values()) for name, counts in splits.items()}
    first = next(iter(splits.values()))
    found = dict.fromkeys(label for counts in splits.values() for label in counts)
    labels = sorted(found, key=lambda label: -first.get(label, 0))
    shown = labels if len(labels) <= _SHOWN else [*labels[:3], "...", *labels[-3:]]

    def cell(name: str, label: str) -> str:
        count = splits[name].get(label, 0)
        return f"{count:,} ({count / totals[name]:.1%})" if label != "..." else ""

    head = f"{len(labels):,} labels" if shown != labels else "labels"
    rows = [(head, *splits), *((short(label), *(cell(name, label) for name in splits)) for label in shown)]
    return ["", *aligned(rows, right=range(1, len(rows[0])))]


def _sweep_forecast(sweep: Json) -> list[str]:
    """What trials cost at each depth, and all of them together."""
    rows = [("frozen blocks", "trials", "to train", "a worker's memory", "a trial", "")]
    for one in sweep["depths"]:
        costs = (amount(one["trainable"]), size(one["memory"]), duration(one["seconds"]))
        stored = "output of the frozen blocks is stored" if one["stored"] else ""
        rows += [(str(one["depth"]), f"{one['share']:.0%}", *costs, stored)]
    early = {"none": "", "pbt": ""}.get(sweep["scheduler"], f", less what {sweep['scheduler']} stops early")
    total = f"{counted(sweep['trials'], 'trial')}, {sweep['at_once']} at a time: about {duration(sweep['seconds'])}"
    return [*aligned(rows, right=range(5)), f"{total}{early}"]


def _memory_lines(memory: Json) -> list[str]:
    """Weights, gradients and optimizer state at each ZeRO stage, the one of the run marked."""
    has = f"; a worker has {size(memory['worker'])}" if memory["worker"] else ""
    rows = [
        (f"ZeRO {stage}", size(needed), "<- this run" if stage == str(memory["zero_stage"]) else "")
        for stage, needed in memory["zero"].items()
    ]
    return [f"memory of a worker for weights, gradients and optimizer state{has}", *aligned(rows, right={1})]
