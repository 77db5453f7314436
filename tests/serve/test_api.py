"""The life of a learner over HTTP, in every form that the contract has."""

from __future__ import annotations

import hashlib
import io
import json
import re
import shlex
import shutil
import subprocess
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import safetensors.torch
from PIL import Image

from pipeline.deploy.client import Client, ServiceError
from tests.serve.asking import example, http, is_problem, png, queries, support, vectors
from tests.serve.service_process import REPOSITORY, ServiceProcess
from tests.unit.tiny_learner import base64_png, picture, tiny_bundle


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    folder = tmp_path_factory.mktemp("api")
    with ServiceProcess(folder / "service", str(tiny_bundle(folder).folder)) as one:
        yield one


@pytest.fixture
def client(service: ServiceProcess, request: pytest.FixtureRequest) -> Iterator[Client]:
    """Of an owner whom no other test shares."""
    with service.client(service.key(owner=request.node.name[:64])) as one:
        yield one


@pytest.fixture
def web(service: ServiceProcess, request: pytest.FixtureRequest) -> Iterator[httpx.Client]:
    with http(service, service.key(owner=request.node.name[:64])) as one:
        yield one


def refused(status: int, call: Any, *arguments: Any) -> str:
    with pytest.raises(ServiceError) as caught:
        call(*arguments)
    assert caught.value.http_status == status
    return str(caught.value)


def test_the_life_of_a_learner(client: Client) -> None:
    live(client)


def live(client: Client) -> None:
    """Also what a service on PostgreSQL must do."""
    pictures = {"cat": [png(1), png(2)], "dog": [png(3)]}
    made = client.teach(pictures, name="pets")
    assert re.fullmatch("lrn_[0-9a-f]{32}", made.id) and made.name == "pets"
    assert [(one.label, one.shots) for one in made.classes] == [("cat", 2), ("dog", 1)]
    assert made.examples == 3 and made.parent is None and made.options.model == "follow"
    assert client.teach(pictures) == made, "the same pictures are the same learner"
    assert client.learner(made.id) == made

    more = client.extend(made.id, {"bird": [png(4)], "dog": [png(5)]})
    assert more.id != made.id and more.parent == made.id and more.name == "pets"
    assert [(one.label, one.shots) for one in more.classes] == [("cat", 2), ("dog", 2), ("bird", 1)]
    assert client.learner(made.id) == made, "learners never change"
    assert [one.id for one in client.learners()] == [more.id, made.id]
    assert client.example(more.id, 3) == png(4)

    answer = client.ask(more.id, [png(4)]).predictions[0]
    assert answer.nearest[0].example == 3 and answer.nearest[0].label == "bird"
    assert answer.nearest[0].similarity == pytest.approx(1.0, abs=1e-5)
    assert {one.label for one in answer.probabilities} == {"cat", "dog", "bird"}
    assert sum(one.probability for one in answer.probabilities) == pytest.approx(1.0, abs=1e-5)
    assert answer.confidence == answer.probabilities[0].probability

    client.delete(made.id)
    for call, arguments in (
        (client.learner, (made.id,)),
        (client.ask, (made.id, [png(1)])),
        (client.example, (made.id, 0)),
        (client.export, (made.id,)),
        (client.extend, (made.id, {"cow": [png(9)]})),
        (client.delete, (made.id,)),
    ):
        assert made.id in refused(404, call, *arguments)
    assert [one.id for one in client.learners()] == [more.id]
    assert client.ask(more.id, [png(4)]).predictions[0] == answer
    again = client.teach(pictures)
    assert again.id == made.id and again.created > made.created


def test_teaching_answers_201_once_and_200_for_the_very_same(web: httpx.Client) -> None:
    body = {"support": support()}
    first, second = (web.post("/v1/learners", json=body) for _ in range(2))
    assert (first.status_code, second.status_code) == (201, 200)
    assert first.json() == second.json()
    pinned = web.post("/v1/learners", json={**body, "options": {"model": "pin"}})
    assert pinned.status_code == 201 and pinned.json()["id"] != first.json()["id"]
    more = {"support": [example(9, "class 0")]}
    paths = [f"/v1/learners/{one.json()['id']}/examples" for one in (first, pinned)]
    children = [web.post(path, json=more) for path in (*paths, paths[0])]
    assert [one.status_code for one in children] == [201, 201, 200]
    assert [one.json()["options"]["model"] for one in children] == ["follow", "pin", "follow"]


def test_the_order_of_examples_counts_for_the_name_but_not_for_the_answer(
    client: Client,
) -> None:
    one = client.teach({"a": [png(1)], "b": [png(2)]})
    two = client.teach({"b": [png(2)], "a": [png(1)]})
    assert one.id != two.id
    first, second = (client.ask(name, [png(7)]).predictions[0] for name in (one.id, two.id))
    assert first.label == second.label
    assert first.confidence == pytest.approx(second.confidence, abs=1e-6)


def test_pages_hold_every_learner_once(client: Client, web: httpx.Client) -> None:
    made = [client.teach({"a": [png(2 * i)], "b": [png(2 * i + 1)]}).id for i in range(7)]
    for limit in (1, 3, 7, 200):
        seen, after = [], ""
        while after is not None:
            query = {"limit": limit, **({"after": after} if after else {})}
            page = web.get("/v1/learners", params=query).json()
            assert 0 < len(page["learners"]) <= limit
            seen += [one["id"] for one in page["learners"]]
            after = page["next"]
        assert seen == made[::-1]
    for limit in ("0", "201", "-1", "x"):
        is_problem(web.get("/v1/learners", params={"limit": limit}), 422)
    is_problem(web.get("/v1/learners", params={"after": "lrn_" + "0" * 32}), 404)
    is_problem(web.get("/v1/learners", params={"after": "x"}), 422)


def test_an_owner_without_learners_has_an_empty_page(web: httpx.Client) -> None:
    assert web.get("/v1/learners").json() == {"learners": [], "next": None}


def test_an_export_vouches_for_itself_and_is_the_same_each_time(client: Client) -> None:
    made = client.teach({"cat": [png(1), png(2)], "dog": [png(3)]})
    content = client.export(made.id)
    assert content == client.export(made.id)
    with zipfile.ZipFile(io.BytesIO(content)) as packed:
        files = {name: packed.read(name) for name in packed.namelist()}
    manifest = json.loads(files.pop("manifest.json"))["files"]
    assert set(manifest) == set(files)
    for name, told in manifest.items():
        assert told["bytes"] == len(files[name])
        assert told["sha256"] == hashlib.sha256(files[name]).hexdigest()
    assert json.loads(files["learner.json"])["id"] == made.id
    assert json.loads(files["labels.json"]) == ["cat", "cat", "dog"]
    assert [files[f"support/000{i}.png"] for i in range(3)] == [png(1), png(2), png(3)]
    tensors = safetensors.torch.load(files["tensors.safetensors"])
    assert tensors["support"].shape[0] == 3


def test_an_example_comes_back_byte_for_byte_in_its_own_form(
    client: Client, web: httpx.Client
) -> None:
    file = io.BytesIO()
    Image.fromarray(picture(1)).save(file, "JPEG")
    made = client.teach({"jpeg": [file.getvalue()], "png": [png(2)]})
    answers = [web.get(f"/v1/learners/{made.id}/examples/{i}") for i in (0, 1)]
    assert [one.headers["content-type"] for one in answers] == ["image/jpeg", "image/png"]
    assert [one.content for one in answers] == [file.getvalue(), png(2)]
    for number in ("2", "-1", "400", "9" * 30):
        is_problem(web.get(f"/v1/learners/{made.id}/examples/{number}"), 404)
    is_problem(web.get(f"/v1/learners/{made.id}/examples/x"), 422)
    is_problem(web.get(f"/v1/learners/{made.id}/examples/" + "1" * 5000), 422)


LABELS = [0, -1, 2**53, -(2**53), "0", "ä ö 猫 🐈‍⬛", "a\u0000b\n\t", "x" * 100, " ", "null", "‮"]


def test_labels_come_back_as_they_were_given(web: httpx.Client) -> None:
    wanted = [example(i, label) for i, label in enumerate(LABELS)]
    made = web.post("/v1/learners", json={"support": wanted})
    assert made.status_code == 201, made.text
    assert [one["label"] for one in made.json()["classes"]] == LABELS
    path = f"/v1/learners/{made.json()['id']}"
    asked = [{"image": one["image"]} for one in wanted]
    predictions = web.post(f"{path}/predict", json={"queries": asked}).json()["predictions"]
    assert [one["nearest"][0]["label"] for one in predictions] == LABELS
    assert web.get(path).json() == made.json()


@pytest.mark.parametrize("label", [True, None, 1.5, 1.0, "", "x" * 101, 2**53 + 1, [], {}, 10**30])
def test_other_labels_are_refused(label: Any, web: httpx.Client) -> None:
    body = {"support": [*support(), {**example(9, "x"), "label": label}], "queries": queries()}
    is_problem(web.post("/v1/predict", json=body), 422)


@pytest.mark.parametrize(("ways", "shots"), [(2, 1), (3, 5), (20, 1), (2, 20), (20, 20)])
def test_any_number_of_classes_and_shots(ways: int, shots: int, web: httpx.Client) -> None:
    body = {"support": support(ways, shots), "queries": queries(3)}
    answer = web.post("/v1/predict", json=body)
    assert answer.status_code == 200, answer.text
    for one in answer.json()["predictions"]:
        assert len(one["probabilities"]) == ways and len(one["nearest"]) == min(3, ways * shots)
        ordered = [row["probability"] for row in one["probabilities"]]
        assert ordered == sorted(ordered, reverse=True)


def test_a_stored_picture_is_the_picture(web: httpx.Client) -> None:
    """`vector` holds what `image` decodes to, so both give the same bits."""
    as_vector = [
        {"vector": picture(i).reshape(-1).tolist(), "label": f"class {i % 2}"} for i in range(4)
    ]
    asked = [{"vector": picture(500).reshape(-1).tolist()}]
    answers = [
        web.post("/v1/predict", json={"support": some, "queries": query}).text
        for some in (support(), as_vector)
        for query in (queries(), asked)
    ]
    assert len(set(answers)) == 1


def test_a_learner_of_vectors_is_kept_and_exported(client: Client, web: httpx.Client) -> None:
    wanted = [{**one, "label": i} for i, one in enumerate(vectors(1) + vectors(1, 255.0))]
    made = web.post("/v1/learners", json={"support": wanted}).json()
    kept = web.get(f"/v1/learners/{made['id']}/examples/1")
    assert kept.headers["content-type"] == "application/json"
    assert kept.json() == wanted[1]["vector"]
    with zipfile.ZipFile(io.BytesIO(client.export(made["id"]))) as packed:
        assert json.loads(packed.read("support/0000.json")) == wanted[0]["vector"]


def test_a_data_url_is_the_picture(web: httpx.Client) -> None:
    urls = [{"image": "data:image/png;base64," + one["image"]} for one in queries()]
    answers = [
        web.post("/v1/predict", json={"support": support(), "queries": asked}).text
        for asked in (queries(), urls)
    ]
    assert answers[0] == answers[1]


def test_files_of_a_form_are_the_same_as_json(web: httpx.Client) -> None:
    files = [(f"support[class {i % 2}]", (f"{i}.png", png(i))) for i in range(4)]
    query = ("query", ("q.png", png(500)))
    by_form = web.post("/v1/predict", files=[*files, query])
    by_json = web.post("/v1/predict", json={"support": support(), "queries": queries()})
    assert by_form.status_code == 200 and by_form.text == by_json.text
    fields = {"name": "of a form", "options": '{"model": "pin"}'}
    made = web.post("/v1/learners", files=files, data=fields)
    assert made.status_code == 201 and made.json()["name"] == "of a form"
    body = {"support": support(), "options": {"model": "pin"}}
    assert web.post("/v1/learners", json=body).json() == made.json()
    path = f"/v1/learners/{made.json()['id']}"
    more = web.post(f"{path}/examples", files=[("support[größer]", ("a.png", png(7)))])
    assert more.status_code == 201 and more.json()["classes"][-1]["label"] == "größer"
    asked = web.post(f"{path}/predict", files=[query], data={"against": "champion"})
    assert asked.text == web.post(f"{path}/predict", json={"queries": queries()}).text


def test_at_once_is_the_same_as_teach_and_ask(client: Client) -> None:
    pictures = {"cat": [png(1), png(2)], "dog": [png(3)]}
    asked = [png(i) for i in range(100, 120)]
    made = client.teach(pictures)
    kept, at_once = client.ask(made.id, asked), client.teach_and_ask(pictures, asked)
    assert kept.predictions == at_once.predictions and kept.model == at_once.model
    assert (kept.learner, at_once.learner) == (made.id, None)
    assert [one.id for one in client.learners()] == [made.id]


def test_a_stranger_to_all_classes_is_unknown(client: Client) -> None:
    made = client.teach({"a": [png(1), png(1)], "b": [png(2), png(2)]})
    stranger = client.ask(made.id, [png(777), png(1)]).predictions
    assert made.unknown_below is not None
    for one in stranger:
        assert one.unknown == (one.nearest[0].similarity < made.unknown_below)
        assert (one.label is None) == one.unknown
    assert not stranger[1].unknown and stranger[1].label == "a"


def test_there_is_no_challenger_to_ask(client: Client, web: httpx.Client) -> None:
    told = client.model()
    assert told.challenger is None and told.champion.algorithm == "protonet"
    assert told.limits["ways"] == 20 and told.limits["body_bytes"] == 10_000_000
    body = {"support": support(), "queries": queries(), "against": "challenger"}
    assert "no challenger" in is_problem(web.post("/v1/predict", json=body), 409)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({}, "support"),
        ({"support": []}, "support"),
        ({"support": support(1)}, "1 different labels"),
        ({"support": [*support(), {"label": "x"}]}, r"support\[4\].*exactly one"),
        ({"support": [*support(), {**example(1, "x"), "text": "a"}]}, r"support\[4\].*exactly one"),
        ({"support": [*support(), {"text": "a", "label": "x"}]}, "pictures, not texts"),
        ({"support": [*support(), {"image": "é", "label": "x"}]}, r"support\[4\].*base64"),
        ({"support": [*support(), {"image": "", "label": "x"}]}, r"support\[4\].*empty"),
        ({"support": [*support(), {"image": "AAAA", "label": "x"}]}, "neither PNG nor JPEG"),
        ({"support": [*support(), {"vector": [], "label": "x"}]}, "a vector of 0 values"),
        ({"support": [*support(), {"vector": [256] * 144, "label": "x"}]}, "from 0 to 255"),
        ({"support": [*support(), {"vector": [-0.1] * 144, "label": "x"}]}, "from 0 to 255"),
        ({"support": [*support(), {"vector": ["1"] * 144, "label": "x"}]}, "valid number"),
        ({"support": [*support(), {"vector": [True] * 144, "label": "x"}]}, "valid number"),
        ({"support": support(), "more": 1}, "more"),
        ({"support": support(), "name": ""}, "name"),
        ({"support": support(), "name": "x" * 201}, "name"),
        ({"support": support(), "name": "a\0b"}, "name"),
        ({"support": support(), "options": {"model": "fly"}}, "options.model"),
    ],
)
def test_a_refusal_says_what_and_where(body: Any, says: str, web: httpx.Client) -> None:
    assert re.search(says, is_problem(web.post("/v1/learners", json=body), 422))


def test_openapi_tells_of_every_route_and_its_examples_are_taken(
    service: ServiceProcess, web: httpx.Client
) -> None:
    schema = web.get("/openapi.json").json()
    assert schema["openapi"].startswith("3.1")
    operations = {
        (method, path): one for path, of in schema["paths"].items() for method, one in of.items()
    }
    assert len(operations) == 15
    text = json.dumps(schema)
    for reference in set(re.findall(r'"#/components/schemas/(\w+)"', text)):
        assert reference in schema["components"]["schemas"]
    for (_, path), one in operations.items():
        assert one["security"] == ([{"key": []}] if path.startswith("/v1/") else [])
    dot = schema["components"]["schemas"]["Input"]["properties"]["image"]["examples"][0]
    label = schema["components"]["schemas"]["Example"]["properties"]["label"]["examples"][0]
    body = {
        "support": [{"image": dot, "label": label}, example(1, "other")],
        "queries": [{"image": dot}],
    }
    found = web.post("/v1/predict", json=body).json()["predictions"][0]
    assert found["nearest"][0]["label"] == label


def test_what_openapi_says_is_what_is_said(web: httpx.Client) -> None:
    """Answers have the fields of their schemas, no more and no fewer."""
    schemas = web.get("/openapi.json").json()["components"]["schemas"]
    made = web.post("/v1/learners", json={"support": support()}).json()
    body = {"support": support(), "queries": queries()}
    answer = web.post("/v1/predict", json=body).json()
    for name, told in (
        ("LearnerTold", made),
        ("Listed", web.get("/v1/learners").json()),
        ("ModelTold", web.get("/v1/model").json()),
        ("Predictions", answer),
        ("Prediction", answer["predictions"][0]),
        ("Readiness", web.get("/readyz").json()),
        ("Problem", web.get("/v1/learners/x").json()),
    ):
        assert set(told) == set(schemas[name]["properties"]), name


def test_health_and_metrics_need_no_key_and_name_nobody(service: ServiceProcess) -> None:
    with http(service) as web:
        assert web.get("/healthz").json() == {"status": "ok"}
        ready = web.get("/readyz").json()
        assert ready["status"] == "ready" and ready["problems"] == []
        text = web.get("/metrics").text
        assert "metaloom_ready 1.0" in text and "lrn_" not in text
        assert web.get("/").text.startswith("<!doctype html>")
        assert web.get("/static/app.js").status_code == 200


def documented_commands() -> list[str]:
    """Every curl command of the documentation, its continued lines joined."""
    places = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").rglob("*.md"))]
    blocks = [
        b for p in places for b in re.findall(r"```(?:bash|sh)\n(.*?)```", p.read_text(), re.S)
    ]
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [line.strip() for line in lines if re.match(r"\s*(\w+=\$\()?curl .*/v1/", line)]


@pytest.mark.parametrize("command", documented_commands())
def test_documented_commands_are_answered(
    command: str, service: ServiceProcess, tmp_path: Path
) -> None:
    """With this service's address and key, and pictures of the names that the command has."""
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    for name in re.findall(r"@([\w./-]+\.(?:png|jpe?g))", command):
        target = tmp_path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.asarray(picture(len(name)))).save(target)
    key = service.key(owner="documented")
    with service.client(key) as client:
        learner = client.teach({"cat": [png(1)], "dog": [png(2)]}).id
    here = re.sub(r"https?://(127\.0\.0\.1|localhost)(:\d+)?", service.url, command)
    here = re.sub(r"lrn_[\w.…]+", learner, here).removesuffix(")")
    for name, value in (("KEY", key), ("METALOOM_KEY", key), ("LEARNER", learner), ("ID", learner)):
        here = re.sub(rf"\$({name}\b|{{{name}}})", value, here)
    here = re.sub(r"^\w+=\$\(", "", here).split(" | ")[0]
    arguments = [*shlex.split(here), "--silent", "--show-error", "--fail-with-body"]
    done = subprocess.run(arguments, cwd=tmp_path, capture_output=True, check=False, timeout=60)
    assert done.returncode == 0, (here.replace(key, "KEY"), done.stdout[-500:], done.stderr)


def test_a_picture_twice_in_two_classes_is_still_a_learner(web: httpx.Client) -> None:
    same = [{"image": base64_png(picture(1)), "label": label} for label in "ab"]
    answer = web.post("/v1/predict", json={"support": same, "queries": queries()})
    assert answer.status_code == 200
    assert answer.json()["predictions"][0]["confidence"] == pytest.approx(0.5, abs=1e-5)
