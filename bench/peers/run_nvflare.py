"""NVFlare's peer-to-peer simulator on the same work: a process per site, which exchange along the graph.

The rounds count from when the last site had its model until the last site was done.
"""

# pyright: reportMissingImports=false
# NVFlare is installed in an environment of its own.

import json
import tempfile
from pathlib import Path

from local import Work, arguments, write_answer
from nvflare.app_opt.p2p.controllers.dist_opt_controller import DistOptController
from nvflare.app_opt.p2p.types import Config, Neighbor, Network, Node
from nvflare.job_config.api import FedJob
from nvflare_site import Site
from safetensors.torch import load_file


def run(folder: Path, out: Path) -> None:
    work = Work(folder)
    nodes = range(work.job["nodes"])
    with tempfile.TemporaryDirectory() as place:
        answers = Path(place) / "answers"
        answers.mkdir()
        job = FedJob(name="peers", min_clients=len(nodes))
        job.to_server(DistOptController(config=Config(network=network(work.W.tolist()))))
        for i in nodes:
            job.to(Site(str(folder), str(answers)), site(i))
        # Fewer threads than sites would dead-lock: every site waits for its neighbours.
        job.simulator_run(f"{place}/workspace", clients=[site(i) for i in nodes], threads=len(nodes))
        states = [load_file(answers / f"{i}.safetensors") for i in nodes]
        times = [json.loads((answers / f"{i}.json").read_text()) for i in nodes]
    began, ended = (max(each[name] for each in times) for name in ("began", "ended"))
    write_answer(out, work, states, began, ended, None, "loopback", "everything on loopback, start and stop included")


def site(node: int) -> str:
    return f"site-{node + 1}"


def network(W: list[list[float]]) -> Network:
    """Rows of W are receivers; a site's own weight is what its neighbours leave."""
    nodes = []
    for i, row in enumerate(W):
        links = [Neighbor(id=site(j), weight=weight) for j, weight in enumerate(row) if weight and j != i]
        nodes.append(Node(id=site(i), neighbors=links))
    return Network(nodes=nodes)


if __name__ == "__main__":
    run(*arguments()[:2])
