"""Rounds under masks, with parties and a server that stop anywhere: feedback is neither lost nor doubled."""

import pytest
import torch

from fedmomentum.aggregation.adapter_sums import AdapterSums
from fedmomentum.aggregation.aggregate import RoundContext, aggregate_updates
from fedmomentum.aggregation.methods.fedmomentum import FedMomentum
from fedmomentum.aggregation.product_from_sums import ClientChange
from fedmomentum.errors import ModelError, SecureSumError
from fedmomentum.global_model.client_state import ClientStateFiles
from fedmomentum.global_model.cross_terms import CrossTerms
from fedmomentum.linalg.low_rank import LowRank
from fedmomentum.linalg.matrix import to_dense
from fedmomentum.lora.adapter import Adapter
from fedmomentum.secure_sum.messages import SumPlan, min_threshold
from fedmomentum.secure_sum.server import SumServer
from tests.helpers import random_matrix
from tests.secure_sum.sums import make_parties, roster

CLIENTS = ["east", "mid", "north", "south", "west"]
MODULE = "q_proj"
SHAPE = (12, 10, 2)
SCALING = 1.75
CHANGE = 0.1
# Of a sum: its values are under masks at the third step.
MASKING = 2


class Stopped(Exception):
    """A process was killed."""


class Site:
    """A client with a disk: only what is in its directory survives a restart of it."""

    def __init__(self, name, folder):
        self.name = name
        self.folder = folder / name
        self.folder.mkdir()

    @property
    def states(self):
        return ClientStateFiles(self.folder, "run", CrossTerms)

    def feedback(self, outcomes, last_round):
        """What the client keeps, from its newest file and what the server says of that round."""
        state = self.states.load(self.name, last_round)
        if state is None:
            return {}
        means, first, second = outcomes.get(state.server_round, (None, [], []))
        held = means if self.name in first else None
        return state.settled(held, in_second_sum=self.name in second)

    def prepare(self, layout, server_round, outcomes):
        """Train, and save what the round needs before anything leaves."""
        num_examples = 20 + 13 * CLIENTS.index(self.name) + server_round
        trained = train(layout.start, self.name, server_round)
        changes = layout.changes(trained, num_examples, self.feedback(outcomes, server_round - 1))
        self.states.save(
            CrossTerms(
                client=self.name,
                run_id="run",
                server_round=server_round,
                num_examples=num_examples,
                changes=changes.modules,
                feedback_limits={MODULE: layout.feedback_limit(MODULE)},
            )
        )
        return changes


def train(start, name, server_round):
    draw = torch.Generator().manual_seed(server_round * 100 + sum(name.encode()))

    def moved(tensor):
        uniform = torch.rand(tensor.shape, generator=draw, dtype=torch.float64)
        return tensor + CHANGE * (2 * uniform - 1).to(tensor.dtype)

    matrix = start.modules[MODULE]
    modules = {MODULE: LowRank(moved(matrix.B), moved(matrix.A))}
    return Adapter(modules, start.scalings, name=name)


class Coordinator:
    """A server that keeps replies, and is killed and resumed before every step if asked to."""

    def __init__(self, folder, resumes):
        self.folder = folder
        self.resumes = resumes
        self.sites = {name: Site(name, folder) for name in CLIENTS}
        self.adapter = Adapter({MODULE: random_matrix(*SHAPE, seed=3)}, {MODULE: SCALING})
        self.base = torch.zeros(SHAPE[:2], dtype=torch.float64)
        self.outcomes = {}
        self.exact = self.model()
        self.expected = 200

    def model(self):
        return self.base + to_dense(self.adapter.effective(MODULE))

    def missing(self, last_round):
        total = torch.zeros(SHAPE[:2], dtype=torch.float64)
        for site in self.sites.values():
            for matrix in site.feedback(self.outcomes, last_round).values():
                total += SCALING * to_dense(matrix)
        return total

    def sum(self, server_round, number, blocks, values, leaves):
        """A masked sum; `leaves` says at which step a party is killed."""
        parties = sorted(values)
        plan = SumPlan(
            run_id="run",
            server_round=server_round,
            number=number,
            attempt=1,
            parties=parties,
            threshold=min_threshold(len(parties)),
            work="0" * 64,
            blocks=blocks,
        )
        actors = {}
        for party, own in values.items():
            actors |= make_parties(plan, {party: own}, self.sites[party].folder)
        server = SumServer(plan, roster(parties))
        kept = []
        while not server.finished:
            if self.resumes:
                server = SumServer(plan, roster(parties))
                for replies in kept:
                    for party, reply in replies.items():
                        server.receive(party, reply)
                    server.advance()
            replies = {}
            for party, message in server.messages().items():
                if len(kept) < leaves.get(party, 99):
                    replies[party] = actors[party].answer(message)
                    server.receive(party, replies[party])
            server.advance()
            kept.append(replies)
        return server.result

    @staticmethod
    def tensors(result):
        return {name: torch.from_numpy(total) for name, total in result.values.items()}

    def round(self, server_round, clients, first_leaves=None, second_leaves=None):
        layout = AdapterSums(
            start=self.adapter,
            factors="BA",
            sketch_ranks=1,
            num_parties=len(clients),
            max_examples=100,
            max_change=CHANGE,
            expected_examples=self.expected,
            seed=server_round,
        )
        changes = {c: self.sites[c].prepare(layout, server_round, self.outcomes) for c in clients}
        values = {c: layout.first_values(m) for c, m in changes.items()}
        first = self.sum(server_round, 1, layout.first_blocks(), values, first_leaves or {})
        means = layout.mean_changes(self.tensors(first))

        values = {c: layout.second_values(changes[c], means) for c in first.survivors}
        survivors = []
        totals = None
        try:
            second = self.sum(server_round, 2, layout.second_blocks(), values, second_leaves or {})
        except SecureSumError:
            pass  # the mean factors alone: clients keep their full cross terms
        else:
            survivors = second.survivors
            totals = self.tensors(second)
        adapters, weights = layout.stand_ins(means, totals)
        context = RoundContext(
            ranks={MODULE: SHAPE[2]},
            scalings={MODULE: SCALING},
            reference=self.adapter,
            server_round=server_round,
        )
        before = to_dense(self.adapter.effective(MODULE))
        result = aggregate_updates(adapters, weights, FedMomentum(), context)

        # What the exact mean of the first sum's clients would have moved.
        counts = {c: changes[c].num_examples for c in first.survivors}
        assert means.num_examples == sum(counts.values())
        for client, count in counts.items():
            trained = train(self.adapter, client, server_round)
            product = to_dense(trained.effective(MODULE))
            self.exact = self.exact + count / means.num_examples * (product - before)
        # the commit
        self.adapter = result.adapter
        for residual in result.residual.values():
            self.base = self.base + to_dense(residual).double()
        self.outcomes[server_round] = (means, first.survivors, survivors)
        self.expected = means.num_examples
        return first.survivors, survivors


@pytest.mark.parametrize("resumes", [False, True])
def test_model_and_feedback_are_the_exact_means_through_all_kills(tmp_path, resumes):
    """Parties are killed within either sum and between them, and while shares are opened."""
    server = Coordinator(tmp_path, resumes)
    rounds = [
        (CLIENTS, {}, {"west": 3}, (CLIENTS, CLIENTS)),
        # killed before its values are sent: it is not in the round
        (CLIENTS, {"mid": MASKING}, {}, (without("mid"), without("mid"))),
        # after its values were sent, within the unmasking: it is
        (CLIENTS, {"mid": 4}, {"mid": 0}, (CLIENTS, without("mid"))),
        # others, one of them killed within the second sum
        (CLIENTS[:4], {}, {"north": MASKING}, (CLIENTS[:4], ["east", "mid", "south"])),
        # too few for the second sum
        (CLIENTS[1:], {}, {"mid": 1, "north": 2}, (CLIENTS[1:], [])),
        (CLIENTS, {}, {}, (CLIENTS, CLIENTS)),
    ]
    for server_round, (clients, first, second, wanted) in enumerate(rounds, start=1):
        assert server.round(server_round, clients, first, second) == wanted
        error = (server.model() + server.missing(server_round) - server.exact).norm()
        assert error < 2e-6 * server.exact.norm(), server_round
    # Feedback matters: without it the model is off by far more.
    assert server.missing(6).norm() > 1e-3 * server.exact.norm()


def without(client):
    return [name for name in CLIENTS if name != client]


def test_a_file_is_what_was_saved_whatever_the_form_of_the_feedback(tmp_path):
    for feedback in (None, random_matrix(6, 5, 2, seed=1), torch.ones(6, 5).double()):
        state = make_state(feedback)
        (tmp_path / "file").write_bytes(state.encode())
        loaded = CrossTerms.read(tmp_path / "file")
        assert (loaded.client, loaded.run_id, loaded.server_round) == ("north", "run", 4)
        assert (loaded.num_examples, loaded.feedback_limits) == (9, {"q": 2.5})
        assert type(loaded.changes["q"].feedback) is type(feedback)
        assert loaded.encode() == state.encode()
        kept = loaded.settled(None, in_second_sum=False)
        assert kept.keys() == ({"q"} if feedback is not None else set())
        assert CrossTerms.read_client(tmp_path / "file") == "north"


def make_state(feedback):
    b, a = random_matrix(6, 5, 2, seed=5).B, random_matrix(6, 5, 2, seed=6).A
    return CrossTerms("north", "run", 4, 9, {"q": ClientChange(9, b, a, feedback)}, {"q": 2.5})


def test_damaged_files_and_outcomes_of_other_adapters_are_refused(tmp_path):
    data = make_state(None).encode()
    file = tmp_path / "file"
    for damaged in (data[:-1], data[:-1] + bytes([data[-1] ^ 1]), b"", data.replace(b"9", b"8", 1)):
        file.write_bytes(damaged)
        with pytest.raises(ModelError, match="cross terms are damaged"):
            CrossTerms.read(file)
    start = Adapter({"q": random_matrix(6, 5, 3, seed=2)}, {"q": 1.0})
    layout = AdapterSums(start, "BA", 1, 3, 9, 1.0, 20, 0)
    changes = layout.changes(start, 9, {})
    means = layout.mean_changes({n: 3 * v for n, v in layout.first_values(changes).items()})
    with pytest.raises(ModelError, match="round 4: its outcome is not that of this client's q"):
        make_state(None).settled(means, in_second_sum=True)
