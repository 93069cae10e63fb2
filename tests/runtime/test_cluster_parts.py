"""Placement of clients, rows that cross, checks of a cluster, tiles and shares of layers."""

import socket
import threading

import numpy as np
import pytest
import torch

from peerlora.config.cluster import ClusterConfig
from peerlora.config.loading import parse_spec
from peerlora.errors import ClusterError, ExtraMissing
from peerlora.exchange.blocks import links_of
from peerlora.lora.adapters import Adapters, AdapterSpec, LayerSpec
from peerlora.lora.diagnostics import diagnose
from peerlora.lora.layer_shares import columns_of_layers, join_shares, measure_share, split_layers
from peerlora.runtime.cluster import machines, session
from peerlora.runtime.cluster.placement import Placement, choose_tile_size, place, plan_transfers
from peerlora.runtime.cluster.rows import Inbox, RowsMissing, SwappedRows
from peerlora.topology.schedule import build_topology
from peerlora.train.tiles import divide_by_tiles, evaluated_tiles, tiles_of, tiles_of_sizes


def links(graph, clients):
    return links_of(build_topology(parse_spec(graph), clients, 0).at(0))


def test_neighbours_come_to_the_same_worker():
    order = np.random.default_rng(0).permutation(24)
    shuffled = np.zeros((24, 24), dtype=bool)
    shuffled[np.ix_(order, order)] = links("ring", 24)
    tiles = tiles_of(24, 1)
    kept, near = place(tiles, 3, None), place(tiles, 3, shuffled)
    assert sorted(sum(near.blocks, [])) == list(range(24)) and all(block == sorted(block) for block in near.blocks)
    rows = [plan_transfers(shuffled, each, 1).rows for each in (kept, near)]
    assert rows[1] <= 12 < rows[0]  # a ring in three parts has 6 rows at its cuts, in Cuthill-McKee order twice that


@pytest.mark.parametrize(
    ("graph", "nodes", "gathers", "rows"),
    [("ring", 1, False, 4), ("complete", 1, False, 8), ("complete", 2, False, 8), ("ring", 4, False, 4)],
)
def test_two_workers_swap_the_rows_that_they_need(graph, nodes, gathers, rows):
    found = plan_transfers(links(graph, 8), place(tiles_of(8, 1), 2, None), nodes)
    assert (found.gathers, found.rows) == (gathers, rows)


def test_many_workers_of_a_dense_graph_gather_all_rows_unless_each_machine_would_get_them():
    placement = place(tiles_of(8, 1), 4, None)
    assert plan_transfers(links("complete", 8), placement, 1).gathers
    assert not plan_transfers(links("complete", 8), placement, 5).gathers
    assert "all-gather" in plan_transfers(links("complete", 8), placement, 1).describe()


@pytest.mark.parametrize(
    ("clients", "workers", "most", "size"),
    [
        (40, 2, 8, 5),
        (40, 1, 8, 8),
        (40, 4, 8, 5),
        (10, 2, 8, 5),
        (12, 2, 8, 6),
        (3, 4, 8, 1),
        (7, 2, 1, 1),
        (16, 2, 8, 8),
    ],
)
def test_tiles_give_no_worker_more_clients_than_they_must(clients, workers, most, size):
    """Forty clients by eight would be 24 on one of two workers, for whom the other waits."""
    assert choose_tile_size(clients, workers, most) == size


def workers(placement, work):
    """What ``work`` returns for every worker's rows, each in a thread."""
    inboxes, found = [Inbox() for _ in placement.blocks], {}

    def run(index):
        def send(number, receivers, values):
            for receiver in receivers:
                values.setflags(write=False)  # as arrays of an object store are
                inboxes[receiver].put(number, index, values)

        found[index] = work(SwappedRows(index, placement, 1, inboxes[index], send, 20.0), placement.blocks[index])

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(inboxes))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[index] for index in range(len(inboxes))]


@pytest.mark.parametrize("graph", ["ring", "complete"])
def test_rows_reach_those_who_need_them_and_the_others_are_zero(graph):
    x, up = torch.randn(9, 5), links(graph, 9)
    placement = Placement(((range(2), range(6, 7)), (range(2, 6),), (range(7, 9),)))

    def work(rows, block):
        return rows.rows_for(x[block], up), rows.all_rows(x[block]), rows.number

    for (some, every, count), block in zip(workers(placement, work), placement.blocks, strict=True):
        needed = up[block].any(axis=0)
        assert torch.equal(some[needed], x[needed]) and torch.equal(every, x) and count == 2
        assert graph == "complete" or not some[~needed].any()


def test_columns_and_vectors_reach_their_workers():
    x, placement = torch.randn(6, 7), place(tiles_of(6, 2), 3, None)
    shares = [torch.tensor([0, 3]), torch.tensor([1, 2, 6]), torch.tensor([], dtype=torch.int64)]

    def work(rows, block):
        return rows.columns(x[block], shares), rows.to_one(1, x[block].sum(0))

    found = workers(placement, work)
    for (columns, _), share in zip(found, shares, strict=True):
        assert torch.equal(columns, x[:, share])
    assert [len(vectors) for _, vectors in found] == [0, 3, 0]
    assert torch.equal(torch.stack(found[1][1]).sum(0), torch.stack([x[b].sum(0) for b in placement.blocks]).sum(0))


def test_vectors_come_to_where_the_own_ones_are():
    """On a GPU, of which "meta" is a double; what came lies in main memory."""
    rows = SwappedRows(0, place(tiles_of(2, 1), 2, None), 1, Inbox(), lambda *sent: None, 20.0)
    rows.inbox.put(1, 1, np.ones(3, np.float32))
    parts = rows.to_one(0, torch.zeros(3, device="meta"))
    assert torch.cat(parts).device.type == "meta" and len(parts) == 2


def test_an_inbox_says_whose_rows_are_missing_and_why():
    inbox = Inbox()
    inbox.put(1, 0, np.zeros(1))
    with pytest.raises(RowsMissing, match=r"workers \[2\] sent no rows in exchange 1: nothing came for 0.01 s"):
        inbox.take(1, [0, 2], 0.01)
    inbox.close("another worker failed")
    with pytest.raises(RowsMissing, match="another worker failed"):
        inbox.take(1, [2], 60)


def test_tiles_are_of_all_clients_and_hold_those_that_train():
    assert tiles_of(5, 2) == [range(2), range(2, 4), range(4, 5)] == tiles_of_sizes([2, 2, 1])
    assert list(divide_by_tiles([0, 3, 4], tiles_of(5, 2))) == [[0], [3], [4]]
    assert list(divide_by_tiles([0, 1, 4], tiles_of(5, 2))) == [[0, 1], [4]]
    assert list(divide_by_tiles([0, 1, 4], tiles_of(5, 2), together=False)) == [[0], [1], [4]]


@pytest.mark.parametrize(
    ("clients", "expected"),
    [
        (5, [(0, 2), (2, 4), (4, 5)]),
        (6, [(0, 2), (2, 4), (4, 6)]),
        (1, [(0, 1)]),
        (7, [(0, 2), (2, 4), (4, 6), (6, 7)]),
    ],
)
def test_an_average_behind_the_clients_fills_the_last_tile_up(clients, expected):
    assert [(part.start, part.stop) for part in evaluated_tiles(clients, tiles_of(5, 2), 2)] == expected


@pytest.mark.parametrize("shares", [1, 2, 3, 5])
@pytest.mark.parametrize("sent", ["all", "B", "none"])
def test_shares_of_layers_add_up_to_the_diagnostics(shares, sent):
    layers = tuple(LayerSpec(f"layer{i}", 4 + i, 3 + i) for i in range(3))
    spec = AdapterSpec(layers, 2, 4.0, head=(("weight", (2, 3)),))
    torch.manual_seed(0)
    before, after = (
        Adapters(spec, torch.randn(6, spec.parameters, dtype=torch.float64), torch.full((6,), 2)) for _ in range(2)
    )
    W = build_topology(parse_spec("ring"), 6, 0).at(0).W
    went = {"all": before, "B": before.select("B"), "none": None}[sent]

    def part(x, own):
        cut = own if x.spec.blocks != ("B",) else type(own)(own.layers, own.rank, own.alpha, blocks=("B",))
        return Adapters(cut, x.flat[:, columns_of_layers(x.spec, own)], x.ranks)

    parts = [own for own in split_layers(spec, shares) if own.layers]
    found = join_shares([measure_share(part(after, own), went and part(went, own), W) for own in parts])
    for name, value in vars(diagnose(after, went, W)).items():
        assert getattr(found, name) == pytest.approx(value, rel=1e-12, abs=1e-15), name


def test_more_cores_than_there_are_is_an_error(monkeypatch):
    monkeypatch.setattr(machines.os, "sched_getaffinity", lambda process: {0, 1})
    monkeypatch.setitem(session.need_extra.__globals__["EXTRAS"], "cluster", ("json",))
    with pytest.raises(ClusterError, match="4 workers with 1 cores each asked for, this process may use 2"):
        session.ray_session(ClusterConfig(workers=4)).__enter__()


@pytest.mark.parametrize("gpus", [0.5, 1, 2])
def test_a_worker_has_a_part_of_a_gpu_or_whole_ones(gpus):
    assert ClusterConfig(gpus_per_worker=gpus).gpus_per_worker == gpus
    with pytest.raises(ValueError, match="a part of one GPU, or a whole number"):
        ClusterConfig(gpus_per_worker=gpus + 1.25)


def test_without_ray_the_command_to_install_it_is_told(monkeypatch):
    monkeypatch.setitem(session.need_extra.__globals__["EXTRAS"], "cluster", ("no_such_module",))
    with pytest.raises(ExtraMissing, match=r"pip install '.\[cluster\]'"):
        session.ray_session(ClusterConfig()).__enter__()


def test_fewer_resources_than_asked_for_are_told():
    settings = ClusterConfig(workers=3, cpus_per_worker=2, gpus_per_worker=0.5)
    machines.check_resources(settings, [{"CPU": 6.0, "GPU": 2.0}])
    with pytest.raises(ClusterError, match="3 workers with 2 CPUs each asked for, the cluster has 5 in all"):
        machines.check_resources(settings, [{"CPU": 5.0, "GPU": 4.0}])
    with pytest.raises(ClusterError, match=r"3 workers with 0.5 GPUs each asked for, the cluster has 0 in all"):
        machines.check_resources(settings, [{"CPU": 6.0}])


@pytest.mark.parametrize("address", ["somewhere:port", ":6379", "ray://:1"])
def test_an_address_of_another_form_is_refused(address):
    with pytest.raises(ClusterError, match="expected auto, host:port or ray://host:port"):
        session.check_address(address)


def test_an_address_at_which_nobody_listens_is_told():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(ClusterError, match=f"no cluster answers at 127.0.0.1:{port}"):
        session.check_address(f"127.0.0.1:{port}")
