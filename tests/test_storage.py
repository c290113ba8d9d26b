"""Datasets and encoders in object stores: an S3 server that is not ours, files, memory, and errors for people."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tensorstore as ts
import torch

import rlrep
from rlrep import cli, storage
from rlrep.dataset import COMMIT, META, Dataset, verify
from rlrep.storage import Url
from rlrep.types import DatasetError, RunError, tree_map

SPEC = "rlrep/TinyGrid-v0:size=5"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset in `data`, and an encoder in `run/encoder`."""
    out = tmp_path_factory.mktemp("store")
    data = rlrep.collect(SPEC, out=out / "data", steps=300, n_envs=4)
    torch.manual_seed(0)
    rlrep.make_encoder("grid:features_dim=8,width=4", data.observation_space).save_pretrained(out / "run" / "encoder")
    return out


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """The address of an S3-compatible server."""
    pytest.importorskip("moto")
    from moto.server import ThreadedMotoServer

    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    yield "http://{}:{}".format(*moto.get_host_and_port())
    moto.stop()


@pytest.fixture
def s3(server: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A bucket's URL with a copy of the folder in it."""
    import boto3

    settings = {"ACCESS_KEY_ID": "key", "SECRET_ACCESS_KEY": "secret", "DEFAULT_REGION": "us-east-1"}
    for name, value in {**settings, "ENDPOINT_URL": server}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    client = boto3.client("s3")
    client.create_bucket(Bucket="bucket")
    for file in folder.rglob("*"):
        if file.is_file():
            client.upload_file(str(file), "bucket", f"some/where/{file.relative_to(folder)}", {"ACL": "public-read"})
    return "s3://bucket/some/where"


@pytest.fixture
def memory(folder: Path) -> str:
    """A copy of the folder in memory."""
    store = ts.KvStore.open("memory://there/", context=storage.context()).result()
    for file in folder.rglob("*"):
        if file.is_file():
            store.write(str(file.relative_to(folder)), file.read_bytes()).result()
    return "memory://there"


@pytest.fixture
def web(server: str, s3: str) -> str:
    """The same files from a web server that lists nothing."""
    return s3.replace("s3:/", server)


@pytest.fixture(params=["s3", "file", "memory", "web"])
def url(request: pytest.FixtureRequest, folder: Path) -> str:
    return f"file://{folder}" if request.param == "file" else request.getfixturevalue(request.param)


def test_what_lies_there_is_what_was_written(url: str, folder: Path) -> None:
    here, there = Dataset(folder / "data"), Dataset(f"{url}/data")
    assert there.digest == here.digest
    for budget in ("auto", 0):
        there = Dataset(f"{url}/data", budget=budget)
        found, wanted = (data.sample(8, 4, np.random.default_rng(0)) for data in (there, here))
        tree_map(torch.testing.assert_close, found.obs, wanted.obs)
    assert verify(f"{url}/data/").ok
    assert there.describe()["episodes"] == here.n_episodes
    for place in (f"{url}/run", f"{url}/run/encoder/"):
        assert rlrep.load_encoder(place).digest() == rlrep.load_encoder(folder / "run").digest()


def test_pretraining_reads_from_there(memory: str, tmp_path: Path) -> None:
    small = {"updates": 4, "batch_size": 8, "encoder": "grid:features_dim=8,width=4"}
    encoder = rlrep.pretrain(f"{memory}/data", out=tmp_path / "run", **small)
    assert encoder.provenance["reward_free_steps"] == 300


def test_the_command_line_takes_urls(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    there = f"file://{folder}"
    assert cli.main(["probe", f"{there}/run", f"{there}/data", "--n", "64"]) == 0
    assert cli.main(["data", "coverage", f"{there}/data", "--out", str(tmp_path / "coverage.png")]) == 0
    assert cli.main(["data", "coverage", f"{there}/data"]) == 1
    assert "is a URL, and rlrep writes to folders" in capsys.readouterr().err


def test_nothing_there(url: str) -> None:
    with pytest.raises(DatasetError, match=f"{url}/nothing is not a dataset folder"):
        Dataset(f"{url}/nothing")
    with pytest.raises(RunError, match=f"no encoder at {url}/nothing"):
        rlrep.load_encoder(f"{url}/nothing")


def test_no_such_bucket(s3: str) -> None:
    with pytest.raises(DatasetError, match="there is no such bucket"):
        Dataset("s3://nobody/data")
    with pytest.raises(RunError, match="there is no such bucket"):
        rlrep.load_encoder("s3://nobody/run")


def test_no_credentials_and_no_network(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(storage.RETRIES, "max_retries", 1)
    monkeypatch.setattr(storage, "context", functools.cache(storage.context.__wrapped__))
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(DatasetError, match="no credentials were found; for s3, set AWS_ACCESS_KEY_ID"):
        Dataset(f"{s3}/data")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(DatasetError, match="the store cannot be reached: Could not connect"):
        Dataset(f"{s3}/data")


def test_a_store_that_is_silent_is_given_up(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "PATIENCE", 0.0)
    with pytest.raises(DatasetError, match="no answer within 0 seconds"):
        Dataset(f"{s3}/data")


@pytest.mark.parametrize(
    ("url", "message"),
    [("az://bucket/data", "knows the URLs of file, gs"), ("s3://b/data", 'Invalid S3 bucket name: "b"')],
)
def test_no_url_of_ours(url: str, message: str) -> None:
    with pytest.raises((DatasetError, ValueError), match=message):
        Dataset(url)


def test_nothing_is_written_to_a_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RunError, match=r"s3://bucket/data is a URL.*copy it up"):
        rlrep.collect(SPEC, out="s3://bucket/data", steps=10)
    assert not list(tmp_path.iterdir())


def test_a_store_is_read_and_nothing_more(s3: str) -> None:
    assert Url(f"{s3}/data/{META}").is_file()
    assert not Url(f"{s3}/data/{META}x").is_file()
    assert str(Url(s3) / "data" / COMMIT) == f"{s3}/data/{COMMIT}"
