"""A round's sums under masks: bytes and processor time of 3 to 100 parties, on one thread.

    python benchmarks/secure_sum.py [--parties 3,10,30,100] [--json FILE]

The adapter is that of the bundled model at rank 8 (query and value projections), the sketch has
one rank. All parties run in this process, one after the other, through the whole protocol; each is
timed for itself. Once nobody drops out, and once as many as may: they leave after they have given
out their shares, which is what costs the server most. Without the network, training, and the
clients' reading of the means.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from common import Target, finish
from cryptography.hazmat.primitives.asymmetric import ec
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from fedmomentum import Adapter, LowRank
from fedmomentum.aggregation.adapter_sums import AdapterSums, ClientChanges
from fedmomentum.aggregation.product_from_sums import MeanChanges
from fedmomentum.global_model.mean_changes import means_object
from fedmomentum.linalg.low_rank import CORE_DTYPE
from fedmomentum.secure_sum.fixed_point import largest_integer
from fedmomentum.secure_sum.journal import PartyJournal
from fedmomentum.secure_sum.messages import STEPS, Block, SumPlan, min_threshold
from fedmomentum.secure_sum.party import Identity, SumParty
from fedmomentum.secure_sum.roster import Roster
from fedmomentum.secure_sum.server import SumServer

RANK = 8
LAYERS = 30
MODULES = {"q_proj": (576, 576), "v_proj": (192, 576)}
MAX_CHANGE = 0.02
MAX_EXAMPLES = 10_000
NUM_EXAMPLES = 400
LEAVES_BEFORE = STEPS.index("values")


class Costs:
    """Processor time and bytes of everybody in a round."""

    def __init__(self) -> None:
        self.party_seconds: dict[str, float] = {}
        self.server_seconds = 0.0
        self.up: dict[str, int] = {}
        self.down: dict[str, int] = {}
        self.values = 0

    def of_party(self, party: str, work: Callable[[], Any]) -> Any:
        """Do a party's work, and count its time."""
        started = time.thread_time()
        result = work()
        before = self.party_seconds.get(party, 0.0)
        self.party_seconds[party] = before + time.thread_time() - started
        return result

    def of_server(self, work: Callable[[], Any]) -> Any:
        """Do the server's work, and count its time."""
        started = time.thread_time()
        result = work()
        self.server_seconds += time.thread_time() - started
        return result


def start_adapter() -> Adapter:
    """Return the adapter that all start from."""
    draw = torch.Generator().manual_seed(0)
    modules = {}
    for layer in range(LAYERS):
        for module, (out_size, in_size) in MODULES.items():
            A = torch.randn(RANK, in_size, generator=draw) / in_size**0.5
            modules[f"layers.{layer}.{module}"] = LowRank(torch.zeros(out_size, RANK), A)
    return Adapter(modules, dict.fromkeys(modules, 2.0))


def trained(start: Adapter, seed: int) -> Adapter:
    """Return an adapter after a client's training: every number has moved a little."""
    draw = torch.Generator().manual_seed(seed)
    modules = {}
    for name, matrix in start.modules.items():
        b, a = (MAX_CHANGE * torch.rand(f.shape, generator=draw) for f in (matrix.B, matrix.A))
        modules[name] = LowRank(matrix.B + b - MAX_CHANGE / 2, matrix.A + a - MAX_CHANGE / 2)
    return Adapter(modules, start.scalings, name=f"client {seed}")


def run_sum(
    plan: SumPlan,
    identities: Mapping[str, Identity],
    values: Callable[[str], Callable[[], Mapping[str, NDArray[np.float64]]]],
    leaving: set[str],
    costs: Costs,
    folder: Path,
) -> dict[str, NDArray[np.float64]]:
    """Run one sum to its end; return its values."""
    parties = {}
    for party in plan.parties:
        own = costs.of_party(party, values(party))  # what the party trained is no cost of a sum
        journal = PartyJournal(folder / f"{party}.json")
        parties[party] = SumParty(identities[party], journal, own)
    server = costs.of_server(lambda: SumServer(plan, identities[plan.parties[0]].roster))
    for step in range(len(STEPS)):
        for party, message in costs.of_server(server.messages).items():
            if party in leaving and step >= LEAVES_BEFORE:
                continue
            costs.down[party] = costs.down.get(party, 0) + len(message)
            reply = costs.of_party(party, partial(parties[party].answer, message))
            costs.up[party] = costs.up.get(party, 0) + len(reply)
            costs.of_server(partial(server.receive, party, reply))
        costs.of_server(server.advance)
    costs.values += 4 * plan.size
    totals: dict[str, NDArray[np.float64]] = server.result.values
    return totals


def measure(num_parties: int, num_leaving: int) -> dict[str, Any]:
    """Run a round of so many parties, of whom some leave, and return what it cost."""
    names = [f"party{number:03}" for number in range(num_parties)]
    keys = {name: ec.generate_private_key(ec.SECP384R1()) for name in names}
    roster = Roster({name: key.public_key() for name, key in keys.items()})
    identities = {name: Identity(name, keys[name], roster) for name in names}
    leaving = set(names[:num_leaving])
    start = start_adapter()
    sums = AdapterSums(
        start=start,
        factors="BA",
        sketch_ranks=1,
        num_parties=num_parties,
        max_examples=MAX_EXAMPLES,
        max_change=MAX_CHANGE,
        expected_examples=num_parties * NUM_EXAMPLES,
        seed=0,
    )
    costs = Costs()

    def changes(party: str) -> ClientChanges:
        return sums.changes(trained(start, names.index(party)), NUM_EXAMPLES, {})

    def first_values(party: str) -> Callable[[], Mapping[str, NDArray[np.float64]]]:
        own = changes(party)
        return lambda: arrays(sums.first_values(own))

    def second_values(party: str) -> Callable[[], Mapping[str, NDArray[np.float64]]]:
        own = changes(party)
        return lambda: arrays(sums.second_values(own, means))

    def plan(number: int, parties: list[str], blocks: list[Block]) -> SumPlan:
        return SumPlan(
            run_id="benchmark",
            server_round=1,
            number=number,
            attempt=1,
            parties=parties,
            threshold=min_threshold(num_parties),
            work="0" * 64,
            blocks=blocks,
        )

    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        first_plan = plan(1, names, sums.first_blocks())
        first = run_sum(
            first_plan,
            identities,
            first_values,
            leaving,
            costs,
            folder,
        )
        means: MeanChanges = costs.of_server(lambda: sums.mean_changes(tensors(first)))
        # The means go to everybody who is left, with the first message of the second sum.
        stayed = [name for name in names if name not in leaving]
        sent = len(means_object(means).data)
        for party in stayed:
            costs.down[party] += sent
        second = run_sum(
            plan(2, stayed, sums.second_blocks()),
            identities,
            second_values,
            set(),
            costs,
            folder,
        )
        costs.of_server(lambda: sums.stand_ins(means, tensors(second)))
    up = median(costs.up[party] for party in stayed)
    return {
        "parties": num_parties,
        "threshold": first_plan.threshold,
        "left": num_leaving,
        "party_seconds": median(costs.party_seconds[party] for party in stayed),
        "server_seconds": costs.server_seconds,
        "up_bytes": up,
        "besides_values_bytes": up - costs.values,
        "down_bytes": median(costs.down[party] for party in stayed),
        "error": mean_error(start, stayed, means),
        # What the sum's integers leave, and rounding to float32 on the way to the clients.
        "error_bound": MAX_EXAMPLES / NUM_EXAMPLES / largest_integer(num_parties) / 2 + 2**-24,
    }


def mean_error(start: Adapter, names: list[str], means: MeanChanges) -> float:
    """Return how far an element of the mean factors is from the exact mean, of `MAX_CHANGE`."""
    totals = {name: torch.zeros(m.B.shape, dtype=CORE_DTYPE) for name, m in start.modules.items()}
    for party in names:
        for name, matrix in trained(start, int(party.removeprefix("party"))).modules.items():
            totals[name] += (matrix.B - start.modules[name].B).to(CORE_DTYPE)
    errors = []
    for name, total in totals.items():
        errors.append(float((means.modules[name].b - total / len(names)).abs().max()))
    return max(errors) / MAX_CHANGE


def arrays(values: Mapping[str, torch.Tensor]) -> dict[str, NDArray[np.float64]]:
    """Return a party's values as the sum takes them."""
    return {block: tensor.numpy() for block, tensor in values.items()}


def tensors(totals: Mapping[str, NDArray[np.float64]]) -> dict[str, torch.Tensor]:
    """Return a sum's values as the layout takes them."""
    return {block: torch.from_numpy(total) for block, total in totals.items()}


def num_parameters() -> int:
    """Return the number of parameters of the adapter."""
    return LAYERS * RANK * sum(map(sum, MODULES.values()))


def tables(measured: Mapping[str, Any]) -> str:
    """Return the table of the documentation."""
    lines = [
        "| parties | of whom leave | a party, s | server, s | up, MB | of it besides values, kB | "
        "down, MB |",
        "|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in measured["rows"]:
        lines.append(
            f"| {row['parties']} | {row['left']} | {row['party_seconds']:.2f} | "
            f"{row['server_seconds']:.2f} | {row['up_bytes'] / 1e6:.2f} | "
            f"{row['besides_values_bytes'] / 1e3:.1f} | {row['down_bytes'] / 1e6:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--parties", default="3,10,30,100")
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for number in map(int, chosen.parties.split(",")):
        for leaving in sorted({0, number - min_threshold(number)}):
            rows.append(measure(number, leaving))
    table = Table("parties", "leave", "party s", "server s", "up MB", "besides kB", "down MB")
    for row in rows:
        table.add_row(
            str(row["parties"]),
            str(row["left"]),
            f"{row['party_seconds']:.2f}",
            f"{row['server_seconds']:.2f}",
            f"{row['up_bytes'] / 1e6:.2f}",
            f"{row['besides_values_bytes'] / 1e3:.1f}",
            f"{row['down_bytes'] / 1e6:.2f}",
        )
    console = Console()
    console.print(table)
    targets = []
    for row in rows:
        name = f"error of a mean of {row['parties']}, {row['left']} left, of the bound of a change"
        targets.append(Target.at_most(name, float(f"{row['error_bound']:.2e}"), row["error"]))
    largest = rows[-1]
    targets.append(
        Target.at_most(
            f"seconds of one of {largest['parties']} parties", 5, largest["party_seconds"]
        )
    )
    finish(
        targets,
        chosen.json,
        console,
        "cryptography",
        "numpy",
        rows=rows,
        parameters=num_parameters(),
    )


if __name__ == "__main__":
    main()
