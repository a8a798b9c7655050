"""The example for Ray Serve, on a cluster of two nodes of this machine."""

from __future__ import annotations

import base64
import json
import sys
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Iterator

import pytest

import respodiff

pytest.importorskip("ray.serve", reason='Ray is not installed; pip install "ray[serve]" to run its example')

import ray
import ray.serve
from ray.cluster_utils import Cluster

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    import ray_serve

    # The replicas import the example by its value, as they would its module from `working_dir`.
    ray.cloudpickle.register_pickle_by_value(ray_serve)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    cluster.add_node(num_cpus=1)
    ray.init(address=cluster.address, log_to_driver=False)
    ray.serve.start(http_options={"port": 8765})
    ray.serve.run(ray_serve.pictures(device="cpu", replicas=2))
    yield "http://127.0.0.1:8765/"
    ray.serve.shutdown()
    ray.shutdown()
    cluster.shutdown()


def ask(url: str, fields: Any) -> Any:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, json.dumps(fields).encode())) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def test_replicas_on_two_nodes_answer_with_the_same_files(url: str) -> None:
    assert len([node for node in ray.nodes() if node["Alive"]]) == 2
    engine = respodiff.Engine(device="cpu")
    requests = [{"prompt": "a doctor", "seed": i, "num_inference_steps": 3, "balance": "woman,man"} for i in range(6)]
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda fields: ask(url, fields), requests))
    for answer, fields in zip(answers, requests):
        expected = engine.generate(**fields)[0]  # type: ignore[arg-type]
        assert base64.b64decode(answer["data"][0]["b64_json"]) == expected.png
        assert answer["data"][0]["parameters"] == expected.info


def test_mistakes_are_answered(url: str) -> None:
    status, answer = ask(url, {"prompt": "x", "widht": 64})
    assert status == 400 and "`width`" in answer["error"]["message"]
    status, answer = ask(url, {"prompt": "x", "concepts": ["womann"]})
    assert (status, answer["error"]["code"]) == (404, "not_found")
    assert ask(url, [1])[0] == 400
    assert ask(url, {})[0] == 400
