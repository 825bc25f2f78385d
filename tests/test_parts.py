"""What the settings of a worker name: topics, ports, destinations of Bulker; as processes."""

from __future__ import annotations

import base64
import gzip
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import confluent_kafka as ck
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from psycopg import sql

from broker import Broker
from mongod import _free_port, closed_port
from postgres import GivenServer
from recognition.cli import main
from recognition.config import load_settings, read_secret
from recognition.errors import ConfigurationError, EventError
from recognition.events import SEGMENT, parse_event
from recognition.graph import open_graph
from recognition.kafka import KafkaSource, UpdatesConsumer, UpdatesTopic
from recognition.parts import bound_times, read_parts
from test_delivery import Warehouse, expected, journey, wait_until
from test_kafka import OPTIONS, Cluster
from test_metrics import read
from test_worker import process, to_segment, write_files

KEY = "an-example-write-key"


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A broker of librdkafka's own; processes reach it by TCP."""
    keeper = ck.Producer({"bootstrap.servers": "none", "test.mock.num.brokers": 1, "log_level": 0})
    (broker,) = keeper.list_topics(timeout=30).brokers.values()
    yield Cluster(f"{broker.host}:{broker.port}", None)
    del keeper


def configure(folder: Path, text: str) -> Path:
    path = folder / "recognition.toml"
    path.write_text(
        f'graph = "sqlite:///{folder}/graph.db"\n[delivery]\nevery_seconds = 0.05\n'
        f"settle_seconds = 0\n{text}"
    )
    return path


def kafka_table(cluster: Cluster, topic: str, dead: str = "", **more: Any) -> str:
    given = {**OPTIONS, **more}
    options = ", ".join(f'"{name}" = {json.dumps(value)}' for name, value in given.items())
    return (
        f'[worker.kafka]\nservers = "{cluster.servers}"\ntopics = "{topic}"\n'
        f'group = "g-{topic}"\nlinger_seconds = 0.1\noptions = {{{options}}}\n'
    ) + (f'dead_letters = "{dead}"\n' if dead else "")


def destination(warehouse: Warehouse) -> str:
    return f'[[destinations]]\nname = "w"\nurl = "{warehouse.url}"\n'


def worker_of(config: Path, *more: str) -> Any:
    return process("-m", "recognition", "worker", "--json", "--config", config, *more)


# Topics -----------------------------------------------------------------------------------------


def test_worker_reads_topics_through_sigkill_and_sigterm(tmp_path: Path, cluster: Cluster) -> None:
    """
    Killed in the middle it goes on where its offsets are; told to stop it has confirmed everything.

    What is no event, of another format or from the future, is in the rejects with its place.
    """
    topic, events = cluster.topic(), journey(30)
    warehouse = Warehouse(tmp_path).make()
    warehouse.put(events)
    config = configure(
        tmp_path,
        f'{destination(warehouse)}[worker]\nrejects = "{tmp_path}/rejects.ndjson"\n'
        + kafka_table(cluster, topic),
    )
    first, second = events[:70], events[70:]
    cluster.write(topic, *map(to_segment, first), b"\x00\x00\x00\x01\x02avro", key="one partition")
    with worker_of(config) as worker:
        wait_until(lambda: sum(cluster.committed(topic, f"g-{topic}").values()) == 71)
        worker.send_signal(signal.SIGKILL)
        worker.wait(60)
    late = {**to_segment(events[0]), "messageId": "late", "timestamp": "2199-01-01T00:00:00Z"}
    cluster.write(topic, *map(to_segment, second), late, key="one partition")
    with worker_of(config) as worker:
        wait_until(lambda: warehouse.users() == expected(30))
        wait_until((tmp_path / "rejects.ndjson").exists)
        wait_until(lambda: len((tmp_path / "rejects.ndjson").read_text().splitlines()) == 2)
        worker.send_signal(signal.SIGTERM)
        out, said = worker.communicate(timeout=60)
    result = json.loads(out)
    rejects = [json.loads(line) for line in (tmp_path / "rejects.ndjson").read_text().splitlines()]

    assert worker.returncode == 1, said  # something was rejected
    assert (result["events"], result["rejected"], result["dead_letters"]) == (50, 1, 1)
    assert sum(cluster.committed(topic, f"g-{topic}").values()) == 122
    assert [(each["reason"], each["line"]) for each in rejects] == [
        ("not JSON", 70),
        ("the time lies too far ahead", 121),
    ]
    assert rejects[0]["source"].startswith(f"{topic}[")
    assert json.loads(rejects[1]["raw"])["messageId"] == "late"
    assert "no port for events is opened" in said
    assert "d7" not in said
    assert "u7" not in said


def test_updates_go_out_to_a_topic(
    tmp_path: Path, cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    """A destination may be a topic: what is read from there brings the rows up to date."""
    topic, events = cluster.topic(), journey(10)
    warehouse = Warehouse(tmp_path).make()
    warehouse.put(events)
    write_files(tmp_path / "in", events, 1)
    config = configure(
        tmp_path,
        f'[worker]\ndirectories = "{tmp_path}/in"\nrejects = "{tmp_path}/r"\n'
        f'[[destinations]]\nname = "out"\nurl = "kafka://{cluster.servers}/{topic}"\n'
        'options = {"delivery.timeout.ms" = 9000}\n',
    )
    code = main(["worker", "--config", str(config), "--once", "--json", "--quiet"])
    result = json.loads(capsys.readouterr().out)
    again = main(["worker", "--config", str(config), "--once", "--json", "--quiet"])
    stop = threading.Event()
    consumer = UpdatesConsumer(
        cluster.servers, [topic], "g", warehouse.sink(), linger=0.1, options=OPTIONS
    )
    reading = threading.Thread(target=consumer.run, args=(stop,))
    reading.start()
    try:
        wait_until(lambda: warehouse.users() == expected(10))
    finally:
        stop.set()
        reading.join(60)
    checked = main(["check", "--config", str(config), "--json"])
    capsys.readouterr()

    assert (code, again, checked) == (0, 0, 0)
    assert result["updates_applied"] == consumer.counts.messages == 10
    assert result["updates_waiting"] == 0


def metric(port: int, *name: str) -> float:
    """One of the numbers that a worker serves; -1: it serves none."""
    text = get(f"http://127.0.0.1:{port}/metrics")
    return -1 if text is None else read(text)[name]


def test_worker_of_updates_applies_a_topic_to_each_destination(
    tmp_path: Path, cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    """
    One worker decides and sends to a topic, another one applies to two databases.

    Each has a group of its own, and the one that is broken holds the other one up neither before
    nor after it is mended. What is no update is a dead letter of both. No graph is made.
    """
    topic, dead, events = cluster.topic(), cluster.topic(), journey(10)
    good = Warehouse(tmp_path).make()
    good.put(events)
    (tmp_path / "other").mkdir()
    broken = Warehouse(tmp_path / "other")
    write_files(tmp_path / "in", events, 1)
    config = configure(
        tmp_path,
        f'[worker]\ndirectories = "{tmp_path}/in"\nrejects = "{tmp_path}/r"\n'
        f'[[destinations]]\nname = "out"\nurl = "kafka://{cluster.servers}/{topic}"\n',
    )
    assert main(["worker", "--config", str(config), "--once", "--quiet"]) == 0
    capsys.readouterr()
    cluster.write(topic, {"no": "update"})
    (tmp_path / "apply").mkdir()
    port = _free_port(())
    apply = configure(
        tmp_path / "apply",
        f'[worker]\nrejects = "{tmp_path}/apply/r"\nmetrics = "127.0.0.1:{port}"\n'
        + kafka_table(cluster, topic, dead).replace("kafka", "updates", 1)
        + "".join(
            f'[[destinations]]\nname = "{name}"\nurl = "{each.url}"\n'
            for name, each in (("good", good), ("broken", broken))
        ),
    )
    broken.path.write_bytes(b"this is no database" * 100)
    before, findings = found(apply, capsys)
    with worker_of(apply) as worker:
        wait_until(lambda: good.users() == expected(10))
        wait_until(lambda: sum(cluster.committed(topic, f"g-{topic}-good").values()) == 11)
        wait_until(lambda: metric(port, "recognition_delivered_failures_total", "broken") > 0)
        assert cluster.committed(topic, f"g-{topic}-broken") == {}
        # At once: with a table and no rows yet its updates would be done with.
        (tmp_path / "mended").mkdir()
        mended = Warehouse(tmp_path / "mended").make()
        mended.put(events)
        mended.path.replace(broken.path)
        wait_until(lambda: broken.users() == expected(10))
        wait_until(lambda: sum(cluster.committed(topic, f"g-{topic}-broken").values()) == 11)
        assert metric(port, "recognition_delivered_updates_total", "broken") == 10
        assert metric(port, "recognition_lag_seconds_count", "good") == 10
        worker.send_signal(signal.SIGTERM)
        out, said = worker.communicate(timeout=60)
    result = json.loads(out)
    after, _ = found(apply, capsys)

    assert worker.returncode == 1, said  # there are dead letters
    assert (result["updates_applied"], result["dead_letters"], result["updates_waiting"]) == (
        20, 2, 0,
    )  # fmt: skip
    assert [letter.value() for letter in cluster.read(dead, 2)] == [b'{"no": "update"}'] * 2
    assert (before, after) == (1, 0)
    assert f"destination good: topic {topic}: 4 partitions, 11 messages wait" in texts(
        findings, "fine"
    )
    assert [text.split(":")[0] for text in texts(findings, "wrong") if dead not in text] == [
        "destination broken"
    ]
    assert "UpdatesSource broken is started again" in said
    assert "d7" not in said
    assert "u7" not in said
    assert not (tmp_path / "apply" / "graph.db").exists()


def _look_for(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """How long `check` waits for the brokers' answer: ten seconds, else."""
    look, look_out = KafkaSource.look, UpdatesTopic.look
    monkeypatch.setattr(KafkaSource, "look", lambda self: look(self, seconds))
    monkeypatch.setattr(UpdatesTopic, "look", lambda self: look_out(self, seconds))


def _certify(path: Path) -> Path:
    """A certificate of ``localhost`` that signs itself, with its key, in one file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    encoding = serialization.Encoding.PEM
    private = key.private_bytes(
        encoding, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    path.write_bytes(certificate.public_bytes(encoding) + private)
    return path


def test_topics_by_tls_and_password(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    As the settings have them: events come in and updates go out.

    With a wrong password, or by a certificate that nobody knows, `check` says so, and no secret is
    told. A worker ends for the password, and waits for the certificate.
    """
    events, password = journey(5), "an-example-password"
    monkeypatch.setenv("KAFKA_PASSWORD", password)
    with Broker(tls=_certify(tmp_path / "pem"), credentials=("recognition", password)) as broker:
        cluster = Cluster(broker.servers, broker, **broker.options, **{"sasl.password": password})
        topic, updates = cluster.topic(), cluster.topic()
        cluster.write(topic, *map(to_segment, events))
        secrets = 'secrets = {"sasl.password" = "env:KAFKA_PASSWORD"}\n'
        given = ", ".join(f'"{name}" = "{value}"' for name, value in broker.options.items())
        config = configure(
            tmp_path,
            f'[worker]\nrejects = "{tmp_path}/r"\n'
            f"{kafka_table(cluster, topic, **broker.options)}{secrets}"
            f'[[destinations]]\nname = "out"\nurl = "kafka://{broker.servers}/{updates}"\n'
            f"options = {{{given}}}\n{secrets}",
        )
        checked, findings = found(config, capsys)
        with worker_of(config) as worker:
            sent = cluster.read(updates, 5)
            wait_until(lambda: sum(cluster.committed(topic, f"g-{topic}").values()) == 20)
            worker.send_signal(signal.SIGTERM)
            out, said = worker.communicate(timeout=60)
        _look_for(monkeypatch, 4.0)
        monkeypatch.setenv("KAFKA_PASSWORD", "a-wrong-password")
        wrong, refused = found(config, capsys)
        with worker_of(config) as worker:
            _, complaint = worker.communicate(timeout=60)
        ended = worker.returncode
        monkeypatch.setenv("KAFKA_PASSWORD", password)
        _certify(tmp_path / "pem")  # another one than the broker shows
        _, unknown = found(config, capsys)
        with worker_of(config) as worker:
            assert worker.stderr is not None
            lines = []
            while not any("_SSL" in line for line in lines):
                lines.append(worker.stderr.readline())
            worker.send_signal(signal.SIGTERM)
            _, rest = worker.communicate(timeout=60)
        waited = "".join(lines) + rest

    assert worker.returncode == 0, waited
    assert "_SSL (TLS is not spoken there, or a certificate was not accepted" in waited
    assert (checked, texts(findings, "wrong"), ended) == (0, [], 3)
    assert f"destination out: topic {updates}: 1 partitions" in texts(findings, "fine")
    assert json.loads(out)["events"] == 20, said
    assert {json.loads(each.value())["set"]["user_id"] for each in sent} == {
        f"u{n}" for n in range(5)
    }
    assert wrong == 1
    assert [text.split(":")[0] for text in texts(refused, "wrong")] == [
        "worker.kafka", "destination out",
    ]  # fmt: skip
    assert all("_AUTHENTICATION" in text for text in texts(refused, "wrong"))
    assert "_AUTHENTICATION" in complaint
    assert len(texts(unknown, "wrong")) == 2
    assert all("_SSL (TLS is not spoken there" in text for text in texts(unknown, "wrong"))
    for told in (said, complaint, waited, str(refused), str(findings)):
        assert password not in told
        assert "a-wrong-password" not in told


@pytest.mark.parametrize(
    ("more", "arguments", "told"),
    [
        ('directories = "in"\n', (), "takes events in, or applies the updates of topics"),
        ("", ("--once",), "has no end and takes no events"),
        ("", (), "needs destinations"),
        ('[[destinations]]\nname = "w"\nurl = "kafka://x/y"\n', (), "w is a topic"),
    ],
)
def test_worker_of_updates_that_cannot_be(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    more: str,
    arguments: tuple[str, ...],
    told: str,
) -> None:
    """What contradicts it is named, and nothing is opened."""
    table = '[worker.updates]\nservers = "nowhere:1"\ntopics = "t"\n'
    worker = f'[worker]\nrejects = "{tmp_path}/r"\n'
    text = f"{worker}{more}{table}" if more.startswith("d") else f"{worker}{table}{more}"
    config = configure(tmp_path, text)

    assert main(["worker", "--config", str(config), *arguments]) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "graph.db").exists()


def test_settings_that_a_worker_of_updates_does_not_look_at_are_named(tmp_path: Path) -> None:
    """What is set and has no effect is said, and what is not set is not."""
    table = '[worker]\npast_days = 9\n[worker.updates]\nservers = "nowhere:1"\ntopics = "t"\n'
    target = '[[destinations]]\nname = "w"\nurl = "sqlite:///w.db"\nsettle_seconds = 5\n'
    (tmp_path / "a.toml").write_text(f"[delivery]\nwindow = 9\n{table}{target}")
    (tmp_path / "b.toml").write_text(table.replace("past_days = 9", ""))
    told, none = (
        [off.text for off in read_parts(load_settings({}, {}, tmp_path / name), {}).off]
        for name in ("a.toml", "b.toml")
    )

    assert (
        "a worker of updates does not look at delivery.window, worker.past_days,"
        " destinations.w.settle_seconds"
    ) in told
    assert not any("does not look at" in text for text in none)


def test_topic_that_is_away_is_waited_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Updates for brokers that nobody runs stay in the outbox, and the exit code says so."""
    write_files(tmp_path / "in", journey(2), 1)
    with closed_port() as nobody:
        config = configure(
            tmp_path,
            f'[worker]\ndirectories = "{tmp_path}/in"\nrejects = "{tmp_path}/r"\n'
            f'[[destinations]]\nname = "out"\nurl = "kafka://127.0.0.1:{nobody}/updates"\n'
            'options = {"delivery.timeout.ms" = 300, "log_level" = 0}\n',
        )
        code = main(["worker", "--config", str(config), "--once", "--json", "--quiet"])
    result = json.loads(capsys.readouterr().out)

    assert code == 3
    assert (result["updates_applied"], result["updates_waiting"]) == (0, 2)


# A port, and all of them at once ----------------------------------------------------------------


def post(port: int, path: str, body: bytes, key: str = KEY, **headers: str) -> int:
    given = {"Authorization": f"Basic {base64.b64encode(f'{key}:'.encode()).decode()}", **headers}
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", body, given)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            status: int = answer.status
    except urllib.error.HTTPError as exc:
        return exc.code
    return status


def get(url: str) -> str | None:
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            text: str = answer.read().decode()
    except OSError:
        return None
    return text


def test_worker_takes_from_a_directory_a_topic_and_a_port_at_once(
    tmp_path: Path, cluster: Cluster
) -> None:
    """
    Events of one visitor that come three ways are one story; what was answered with 200 stays.

    What is refused is counted by its reason, and kept where somebody with a key has sent it.
    """
    topic, dead, events = cluster.topic(), cluster.topic(), journey(9)
    warehouse = Warehouse(tmp_path).make()
    warehouse.put(events)
    port = _free_port(())
    shown = _free_port((port,))
    (tmp_path / "keys").write_text(f"{KEY}\nanother\n")
    config = configure(
        tmp_path,
        f'{destination(warehouse)}[worker]\nrejects = "{tmp_path}/rejects.ndjson"\n'
        f'directories = "{tmp_path}/in"\nmetrics = "127.0.0.1:{shown}"\n'
        f"{kafka_table(cluster, topic, dead)}"
        f'[worker.http]\nport = {port}\nkeys = "file:{tmp_path}/keys"\nmax_body_bytes = 20000\n',
    )
    write_files(tmp_path / "in", events[0::3], 1)
    posted = [to_segment(event) for event in events[2::3]]
    with worker_of(config) as worker:
        wait_until(lambda: get(f"http://127.0.0.1:{port}/readyz"))
        answers = [
            post(port, "/v1/batch", gzip.compress(json.dumps({"batch": posted}).encode()),
                 **{"Content-Encoding": "gzip"}),
        ]  # fmt: skip
        worker.send_signal(signal.SIGKILL)
        worker.wait(60)
    # Now, so that it is this worker who counts them, however long the other one lived.
    cluster.write(topic, *map(to_segment, events[1::3]), b"\xffforeign", {"no": "event"})
    far = {**posted[0], "messageId": "far", "timestamp": "1999-01-01T00:00:00Z"}
    with worker_of(config) as worker:
        wait_until(lambda: get(f"http://127.0.0.1:{port}/readyz"))
        answers += [
            post(port, "/v1/track", json.dumps(posted[0]).encode(), key="wrong"),
            post(port, "/v1/track", b"x" * 20_001),
            post(port, "/v1/track", b"\x1f\x8bnot gzip", **{"Content-Encoding": "gzip"}),
            post(port, "/v1/track", json.dumps(far).encode()),
        ]
        wait_until(lambda: warehouse.users() == expected(9))
        wait_until(lambda: metric(shown, "recognition_kafka_messages_total") == 14)
        letters = len(cluster.read(dead, 2))
        text = get(f"http://127.0.0.1:{shown}/metrics") or ""
        same = get(f"http://127.0.0.1:{port}/metrics") or ""
        worker.send_signal(signal.SIGTERM)
        out, said = worker.communicate(timeout=60)
    found = read(text)
    result = json.loads(out)
    rejects = [json.loads(line) for line in (tmp_path / "rejects.ndjson").read_text().splitlines()]

    assert worker.returncode == 1, said
    assert answers == [200, 401, 413, 400, 200]
    assert letters == 2
    assert result["dead_letters"] == 2
    assert {each["reason"] for each in rejects} == {
        "the body is too large", "the gzip stream is damaged", "the time lies too far back",
    }  # fmt: skip
    assert found["recognition_kafka_dead_total", "not UTF-8"] == 1
    assert found["recognition_kafka_bytes_total",] > 1000
    assert found["recognition_receiver_rejected_total", "the write key is not known"] == 1
    assert found["recognition_receiver_requests_total", "413"] == 1
    assert found["recognition_rejected_reasons_total", "the time lies too far back"] == 1
    assert read(same).keys() == found.keys()
    assert KEY not in said + text + out + (tmp_path / "rejects.ndjson").read_text()
    assert "d3" not in said


def test_port_that_is_taken_is_waited_for(tmp_path: Path) -> None:
    """The worker says so, and listens when whoever held it has gone."""
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        config = configure(
            tmp_path,
            f'[worker]\nrejects = "{tmp_path}/r"\n'
            f'[worker.http]\nport = {port}\nkeys = "env:KEYS"\n',
        )
        with subprocess.Popen(
            [sys.executable, "-m", "recognition", "worker", "--config", str(config)],
            env={**os.environ, "KEYS": KEY},
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        ) as worker:
            assert worker.stderr is not None
            for line in worker.stderr:
                if "started again" in line:
                    break
            holder.close()
            wait_until(lambda: get(f"http://127.0.0.1:{port}/healthz") == "ok")
            worker.send_signal(signal.SIGTERM)
            worker.stderr.read()
            assert worker.wait(60) == 0


# Secrets ----------------------------------------------------------------------------------------


def test_secrets_come_from_the_environment_or_a_file(tmp_path: Path) -> None:
    """Without the white space around them; a place that holds none is named."""
    (tmp_path / "secret").write_text("from a file\n")

    assert read_secret("env:X", {"X": " from the environment "}) == "from the environment"
    assert read_secret(f"file:{tmp_path}/secret", {}) == "from a file"
    for place, told in (("env:Y", "no such variable"), ("env:Z", "empty"), ("file:/no", "cannot")):
        with pytest.raises(ConfigurationError, match=f"{place}.*{told}"):
            read_secret(place, {"Z": " "})


@pytest.mark.parametrize(
    ("environ", "told"),
    [
        ({"RECOGNITION_WORKER__HTTP__KEYS": "hunter2"}, "say env:NAME or file:PATH"),
        (
            {"RECOGNITION_WORKER__KAFKA":
             '{"servers": "b", "topics": "t", "options": {"sasl.password": "hunter2"}}'},
            'secrets = {"sasl.password" = "env:NAME"}',
        ),
        (
            {"RECOGNITION_WORKER__KAFKA":
             '{"servers": "b", "topics": "t", "secrets": {"sasl.password": "hunter2"}}'},
            "say env:NAME or file:PATH",
        ),
        ({"RECOGNITION_WORKER__HTTP__PORTS": "1"}, "RECOGNITION_WORKER__HTTP__PORT"),
        ({"RECOGNITION_WORKER__KAFKA__TOPIC": "t"}, "RECOGNITION_WORKER__KAFKA__TOPICS"),
        ({"RECOGNITION_BULKER__SORCE": "x"}, "RECOGNITION_BULKER__SOURCE"),
    ],
)  # fmt: skip
def test_secret_that_stands_in_the_settings_is_refused(
    environ: Mapping[str, str], told: str
) -> None:
    """The text says where it belongs, and does not repeat it; an unknown key gets the nearest."""
    with pytest.raises(ConfigurationError) as caught:
        load_settings({}, environ)

    assert told in str(caught.value)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        'sink = "{url}"\n[sink_options]\nadd_missing_column = true\n',
        '[[destinations]]\nname = "w"\nurl = "{url}"\noptions = {{add_missing_column = true}}\n',
        '[[destinations]]\nname = "w"\nurl = "{url}"\n'
        'secrets = {{add_missing_column = "env:HOME"}}\n',
    ],
    ids=["sink", "destination", "secret"],
)
def test_options_reach_the_sinks_of_a_worker(
    tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those of `[sink_options]`, those of a destination, and those that are secret: to be seen by
    one that is wrong."""
    path = tmp_path / "recognition.toml"
    own = text.format(url=Warehouse(tmp_path).make().url)
    path.write_text(f'graph = "sqlite:///{tmp_path}/graph.db"\n{own}')
    codes = [main([command, "--config", str(path)]) for command in ("worker", "check")]
    told = capsys.readouterr()

    assert codes == [2, 1]
    assert "did you mean 'add_missing_columns'?" in told.err
    assert "did you mean 'add_missing_columns'?" in told.out


# Times ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("off", "told"),
    [
        (timedelta(hours=25), "the time lies too far ahead"),
        (timedelta(hours=23), None),
        (timedelta(days=-3649), None),
        (timedelta(days=-3651), "the time lies too far back"),
    ],
)
def test_time_that_lies_too_far_away_is_refused(off: timedelta, told: str | None) -> None:
    """A day ahead and ten years back are taken where nothing is said; 0 takes every time."""
    body = {"messageId": "m", "type": "page", "timestamp": (datetime.now(UTC) + off).isoformat()}
    settings = load_settings({}, {})
    open_ended = load_settings(
        {}, {"RECOGNITION_WORKER__FUTURE_HOURS": "0", "RECOGNITION_WORKER__PAST_DAYS": "0"}
    )
    parse_event(body, bound_times(SEGMENT, open_ended))

    if told is None:
        parse_event(body, bound_times(SEGMENT, settings))
    else:
        with pytest.raises(EventError, match=told):
            parse_event(body, bound_times(SEGMENT, settings))


# Bulker -----------------------------------------------------------------------------------------


def bulker_yaml(folder: Path, server: GivenServer, database: str, more: str = "") -> Path:
    path = folder / "bulker.yaml"
    path.write_text(
        f"""
destinations:
  PG-Main:
    type: postgres
    credentials: {{host: "{server.host}", port: {server.port}, database: {database},
      defaultSchema: raw, username: "{server.user}", password: "{server.password}"}}
    defaultTableName: visits
    options:
      mode: batch
      frequency: 1
      primaryKey: id
      timestampColumn: at
      deduplicate: true
      functions:
        - functionId: builtin.transformation.user-recognition
          functionOptions: {{eventTypes: [page], lookbackWindowDays: 7}}
{more}"""
    )
    return path


def test_destinations_of_bulker_need_no_second_configuration(
    tmp_path: Path, postgres: GivenServer, capsys: pytest.CaptureFixture[str]
) -> None:
    """
    Its file alone says where the rows are, their columns, the look-back, and what is remembered.

    A destination of which nothing can be updated is an error that lists it, until it may be
    skipped; then that is said.
    """
    now = datetime.now(UTC)

    def event(id: str, days: float, type: str = "page", **more: object) -> dict[str, object]:
        time = (now - timedelta(days=days)).isoformat()
        return {"messageId": id, "type": type, "timestamp": time, "anonymousId": "a1", **more}

    events = [
        event("old", 9), event("page", 3), event("track", 3, "track", event="Seen"),
        event("who", 1, "identify", userId="u1"),
    ]  # fmt: skip
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "1.ndjson").write_text("\n".join(map(json.dumps, events)))
    with postgres.database() as name:
        postgres.run(sql.SQL("CREATE SCHEMA raw"), database=name)
        table = (
            "CREATE TABLE raw.visits (id text PRIMARY KEY, anonymous_id text, user_id text,"
            " at timestamptz)"
        )
        postgres.run(sql.SQL(table), database=name)
        for each in events:
            postgres.run(
                sql.SQL("INSERT INTO raw.visits VALUES (%s, 'a1', %s, %s)"),
                [each["messageId"], each.get("userId"), each["timestamp"]],
                database=name,
            )
        s3 = "  files: {type: s3, credentials: {bucket: b}}\n"
        config = configure(
            tmp_path,
            f'[worker]\ndirectories = "{tmp_path}/in"\nrejects = "{tmp_path}/r"\n'
            f'[bulker]\nsource = "file://{bulker_yaml(tmp_path, postgres, name, s3)}"\n',
        )
        refused = main(["worker", "--config", str(config), "--once"])
        why = capsys.readouterr().err
        config.write_text(config.read_text() + "skip_unsupported = true\n")
        checked = main(["check", "--config", str(config)])
        capsys.readouterr()
        code = main(["worker", "--config", str(config), "--once", "--json"])
        told = capsys.readouterr()
        users = dict(postgres.run(sql.SQL("SELECT id, user_id FROM raw.visits"), database=name))
        explained = main(["explain", "anonymous_id:a1", "--config", str(config)])
        capsys.readouterr()
    result = json.loads(told.out)

    assert refused == 2
    assert "files (s3)" in why
    assert (checked, code, explained) == (0, 0, 0)
    assert users == {"old": None, "page": "u1", "track": None, "who": "u1"}
    assert result["ignored"] == 1
    assert list(result["destinations"]) == ["pg-main"]
    assert "files is left out: nothing of the type s3 is updated" in told.err
    assert "other types than page are not remembered" in told.err
    assert result["updates_held"] == 1  # Bulker may write the row again
    assert postgres.password == "" or postgres.password not in told.err


def test_what_is_set_beside_bulker_stands_above_it(tmp_path: Path, postgres: GivenServer) -> None:
    """Layout, look-back and settling of our own settings; where none are, those of Bulker."""
    path = bulker_yaml(tmp_path, postgres, "d")
    table = {"source": str(path)}
    plain = load_settings({"bulker": table}, {})
    own = load_settings(
        {
            "bulker": table,
            "layout": "segment",
            "lookback_days": 3,
            "delivery": {"settle_seconds": 7},
        },
        {},
    )
    chosen = load_settings({"bulker": {**table, "destinations": ["PG-Main"]}}, {})
    missing = load_settings({"bulker": {**table, "destinations": ["pg"]}}, {})
    kept = load_settings({"bulker": table, "retention_days": 5, "lookback_days": 5}, {})
    variable = {"DEST_X": '{"type": "postgres", "credentials": {"host": "h", "database": "d"}}'}
    from_environment = load_settings({"bulker": {"source": "env://DEST"}}, {})
    theirs, ours = read_parts(plain, {}), read_parts(own, {})

    assert theirs.rules.layout.table == "visits"
    assert theirs.rules.layout.columns.time == "at"
    assert theirs.rules.attribution.lookback == 7 * 86_400_000_000
    assert [(target.settle, target.again) for target in theirs.targets] == [(120, 38 * 3600)]
    assert ours.rules.layout.name == "segment"
    assert ours.rules.attribution.lookback == 3 * 86_400_000_000
    assert [target.settle for target in ours.targets] == [7]
    assert [target.name for target in read_parts(chosen, {}).targets] == ["pg-main"]
    assert [target.name for target in read_parts(from_environment, variable).targets] == ["x"]
    assert read_parts(kept, {}).rules.attribution.lookback == 5 * 86_400_000_000
    with pytest.raises(ConfigurationError, match=r"names pg; those .* are PG-Main"):
        read_parts(missing, {})


def test_references_live_as_long_as_a_claim_of_bulker_reaches(
    tmp_path: Path, postgres: GivenServer
) -> None:
    """A look-back that Bulker's configuration says is compared with the retention, too."""
    path = bulker_yaml(tmp_path, postgres, "d")
    path.write_text(path.read_text().replace("lookbackWindowDays: 7", "lookbackWindowDays: 90"))
    settings = load_settings({"bulker": {"source": str(path)}, "retention_days": 60}, {})

    with pytest.raises(ConfigurationError, match="reaches back 90 days"):
        read_parts(settings, {})


# Check ------------------------------------------------------------------------------------------


def found(config: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, list[dict[str, str]]]:
    code = main(["check", "--config", str(config), "--json"])
    told = capsys.readouterr()
    assert code in (0, 1), told.err
    return code, json.loads(told.out)


def texts(findings: Sequence[Mapping[str, str]], level: str) -> list[str]:
    return [f"{each['place']}: {each['text']}" for each in findings if each["level"] == level]


def test_check_looks_at_topics_ports_directories_and_rejects(
    tmp_path: Path, cluster: Cluster, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    """Each source is looked at, nothing is read; what is missing comes with its command."""
    topic, dead = cluster.topic(), cluster.topic()
    cluster.write(topic, *map(to_segment, journey(2)))
    cluster.write(dead, b"x")
    (tmp_path / "in" / "failed").mkdir(parents=True)
    (tmp_path / "in" / "failed" / "1.csv").write_text("a,a\n")
    (tmp_path / "rejects").write_text('{"reason": "no time"}\n{"reason": "no time"}\n')
    monkeypatch.setenv("WRITE_KEYS", "one, two")
    with socket.create_server(("127.0.0.1", 0)) as holder:
        config = configure(
            tmp_path,
            f'[worker]\nrejects = "{tmp_path}/rejects"\nmetrics = "127.0.0.1:{_free_port(())}"\n'
            f'directories = ["{tmp_path}/in", "{tmp_path}/nowhere"]\n'
            f'[worker.http]\nport = {holder.getsockname()[1]}\nkeys = "env:WRITE_KEYS"\n'
            f"{kafka_table(cluster, topic, dead)}"
            f'[[destinations]]\nname = "out"\nurl = "kafka://{cluster.servers}/{dead}"\n',
        )
        code, findings = found(config, capsys)
    again, _ = found(config, capsys)
    monkeypatch.setenv("WRITE_KEYS", " ")
    _, without = found(config, capsys)

    assert (code, again) == (1, 1)
    assert texts(findings, "wrong") == [
        f"directory {tmp_path}/in: 1 files could not be read",
        f"directory {tmp_path}/nowhere: it is not there",
    ]
    assert f"worker.kafka: topic {topic}: 4 partitions, 8 messages wait" in texts(findings, "fine")
    assert f"worker.kafka: topic {dead}: 1 dead letters" in texts(findings, "fine")
    assert f"destination out: topic {dead}: 4 partitions" in texts(findings, "fine")
    assert "worker.http: 2 write keys are let in" in texts(findings, "fine")
    assert any("that is right while a worker runs" in text for text in texts(findings, "note"))
    assert f"rejects {tmp_path}/rejects: 2 events became none: 2 no time" in texts(findings, "note")
    assert "worker.http: env:WRITE_KEYS is empty" in texts(without, "wrong")
    assert cluster.committed(topic, f"g-{topic}") == {}


def test_check_of_brokers_that_nobody_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are named as what does not answer, in a few seconds."""
    _look_for(monkeypatch, 0.5)
    with closed_port() as nobody:
        server = f"127.0.0.1:{nobody}"
        config = configure(
            tmp_path,
            f'[worker]\nrejects = "{tmp_path}/r"\n'
            f'[worker.kafka]\nservers = "{server}"\ntopics = "t"\noptions = {{log_level = 0}}\n'
            f'[[destinations]]\nname = "out"\nurl = "kafka://{server}/t"\n'
            "options = {log_level = 0}\n",
        )
        code, findings = found(config, capsys)

    assert code == 1
    assert [text.split(":")[0] for text in texts(findings, "wrong")] == [
        "worker.kafka", "destination out",
    ]  # fmt: skip


def test_check_of_a_topic_that_is_missing(
    tmp_path: Path, cluster: Cluster, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    """The command that makes it is shown; a pattern that matches nothing yet is no fault."""
    config = configure(
        tmp_path,
        f'[worker]\nrejects = "{tmp_path}/r"\n[worker.kafka]\nservers = "{cluster.servers}"\n'
        'topics = ["missing", "^none\\\\..*"]\n',
    )
    code, findings = found(config, capsys)
    (wrong,) = [each for each in findings if each["level"] == "wrong"]

    assert code == 1
    assert wrong["text"] == "topic missing: it is not there"
    assert wrong["fix"] == (
        f"kafka-topics.sh --bootstrap-server {cluster.servers} --create --topic missing"
        " --partitions 8"
    )
    assert r"worker.kafka: no topic matches ^none\..* yet" in texts(findings, "fine")


def test_check_compares_the_clock_of_the_graph(
    tmp_path: Path, mongodb_url: str, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    """The server's clock decides about leases: where it is wrong, what mends it is told."""
    from recognition.graph.mongo import MongoGraph

    config = tmp_path / "recognition.toml"
    config.write_text(f'graph = "{mongodb_url}"\n[worker]\nrejects = "{tmp_path}/r"\n')
    with closing(open_graph(mongodb_url)) as graph:
        off = abs(graph.clock() - datetime.now(UTC))  # type: ignore[attr-defined]
    right, _ = found(config, capsys)
    clock: Callable[[Any], datetime] = MongoGraph.clock
    monkeypatch.setattr(MongoGraph, "clock", lambda self: clock(self) + timedelta(minutes=2))
    wrong, findings = found(config, capsys)

    assert off < timedelta(seconds=30)
    assert (right, wrong) == (0, 1)
    assert [each["fix"] for each in findings if each["level"] == "wrong"] == [
        "timedatectl set-ntp true"
    ]
