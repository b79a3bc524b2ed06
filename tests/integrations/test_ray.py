"""Corpora on a real local Ray of two workers, some of which are killed: the shards are the local job's."""

import errno
import json
import os
import signal
import sys
from itertools import product

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny

from pyglobenc.cli.main import main
from pyglobenc.integrations import ray as engine
from pyglobenc.scale.corpus import manifest
from pyglobenc.scale.corpus.reading import from_row, to_row

SHARD = 5
TEXTS = ["the film", "", "good " * 60, "a deep film", "the good", "film", "deep", "a", "", "the", "x"] * 3
# Files whose ends aren't those of shards, one of them empty.
FILES = [(0, 7), (7, 8), (8, 8), (8, 24), (24, len(TEXTS))]
# A job writes the side file of a shard and then the shard, each with one fsync and one replace. There are 7
# shards with 6 side files.
MOMENTS = list(product(("before", "after"), ("fsync", "replace"), (1, 2, 4, 6, 7)))
# They take long, so all of them run only on request. Otherwise the worker dies where a shard's side file is
# there and the shard is not.
MOMENTS = MOMENTS if os.environ.get("PYGLOBENC_ALL_KILLS") else [("before", "replace", 4)]


@pytest.fixture(scope="module")
def two_workers():
    # Ray takes seconds to import, so a process that runs other tests does not import it.
    ray = pytest.importorskip("ray", reason="needs Ray Data: pip install 'ray[data]'")
    pytest.importorskip("ray.data", reason="needs Ray Data: pip install 'ray[data]'")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
        # Workers don't import tests.
        ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
        handler = signal.getsignal(signal.SIGTERM)
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
        # Ray's handler would end the process of tests that send themselves a signal.
        signal.signal(signal.SIGTERM, handler)
        try:
            yield ray
        finally:
            ray.shutdown()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A model, a corpus of several files, and its finished local job."""
    folder = tmp_path_factory.mktemp("finished")
    for part in (tiny.classifier(), tiny.tokenizer()):
        part.save_pretrained(folder / "model")
    (folder / "corpus").mkdir()
    for number, (start, stop) in enumerate(FILES):
        table = pa.table({"text": pa.array(TEXTS[start:stop], pa.string()), "id": range(start, stop)})
        pq.write_table(table, folder / "corpus" / f"{number}.parquet")
    assert run(folder, folder / "whole") == 0
    return folder


def run(folder, output, *options):
    command = ["attribute", "--model", str(folder / "model"), "--input", str(folder / "corpus"), "--quiet"]
    return main([*command, "--output", str(output), "--shard-size", str(SHARD), "--keep", "id", *options])


def run_on_ray(folder, output, *options):
    return run(folder, output, "--engine", "ray", "--concurrency", "2", *options)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def is_complete(folder):
    return json.loads((folder / manifest.NAME).read_text())["complete"]


def once(flag):
    """Tell whether this is the first call with this file, in any process."""
    try:
        os.close(os.open(flag, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


def dying_at(moment, flag):
    """Return a writer whose process kills itself once, before or after one of its calls of an os function."""
    when, name, count = moment

    class Dying(engine._ShardWriter):
        calls = 0

        def __call__(self, batch):
            original = getattr(os, name)

            def counted(*args):
                self.calls += 1
                dies = self.calls >= count and once(flag)
                if dies and when == "before":
                    os.kill(os.getpid(), signal.SIGKILL)
                original(*args)
                if dies:
                    os.kill(os.getpid(), signal.SIGKILL)

            setattr(os, name, counted)
            try:
                return super().__call__(batch)
            finally:
                setattr(os, name, original)

    return Dying


def check_killed(finished, tmp_path, monkeypatch, moment):
    flag = tmp_path / "killed"
    monkeypatch.setattr(engine, "_ShardWriter", dying_at(moment, str(flag)))
    assert run_on_ray(finished, tmp_path / "out") == 0
    assert flag.exists(), "a worker was killed"
    assert contents(tmp_path / "out") == contents(finished / "whole"), "no row is lost or doubled"


@pytest.mark.slow
def test_a_shard_that_ends_every_worker_ends_the_job(two_workers, finished, tmp_path, monkeypatch, capsys):
    class Dying(engine._ShardWriter):
        def __call__(self, batch):
            os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(engine, "_ShardWriter", Dying)
    monkeypatch.setattr(engine, "RETRIES", 0)
    assert run_on_ray(finished, tmp_path / "out") == 1
    assert "Ray lost the worker of one shard 1 times" in capsys.readouterr().err
    assert not is_complete(tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("moment", MOMENTS, ids=lambda moment: "-".join(map(str, moment)))
def test_a_killed_worker_loses_and_doubles_nothing(two_workers, finished, tmp_path, monkeypatch, moment):
    check_killed(finished, tmp_path, monkeypatch, moment)


@pytest.mark.slow
def test_a_killed_reader_loses_and_doubles_nothing(two_workers, finished, tmp_path, monkeypatch):
    read, flag = engine.read_batch, str(tmp_path / "killed")

    def dying(*arguments):
        for number, row in enumerate(read(*arguments)):
            if number == 1 and once(flag):
                os.kill(os.getpid(), signal.SIGKILL)
            yield row

    monkeypatch.setattr(engine, "read_batch", dying)
    assert run_on_ray(finished, tmp_path / "out") == 0
    assert os.path.exists(flag) and contents(tmp_path / "out") == contents(finished / "whole")


@pytest.mark.slow
def test_either_engine_goes_on_where_the_other_stopped(two_workers, finished, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"

    class Full(engine._ShardWriter):
        def __call__(self, batch):
            def fails(*args):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

            # The process ends with the job.
            if from_row(batch)[0].shard >= 3:
                os.fsync = fails
            return super().__call__(batch)

    with monkeypatch.context() as patch:
        patch.setattr(engine, "_ShardWriter", Full)
        assert run_on_ray(finished, out) == 1
    error = capsys.readouterr().err
    assert "No space left on device" in error and str(out) in error and error.count("\n") == 1
    assert not is_complete(out) and not (out / "part-000006.parquet").exists()
    assert run(finished, out) == 0 and contents(out) == contents(finished / "whole")
    (out / "part-000002.parquet").unlink()
    (out / "_rejected-000004.jsonl").unlink()
    assert run_on_ray(finished, out) == 0 and contents(out) == contents(finished / "whole")


@pytest.mark.slow
def test_a_folder_that_is_not_shared_is_noticed(two_workers, finished, tmp_path, monkeypatch, capsys):
    class Elsewhere(engine._ShardWriter):
        def __init__(self, loading, facts, plan):
            super().__init__(loading, facts, plan)
            self.plan.folder.with_name("elsewhere").mkdir(exist_ok=True)
            vars(self.plan)["folder"] = self.plan.folder.with_name("elsewhere")

    monkeypatch.setattr(engine, "_ShardWriter", Elsewhere)
    assert run_on_ray(finished, tmp_path / "out") == 1
    assert "7 of 7 shards aren't complete after the job; do all nodes share" in capsys.readouterr().err
    assert not is_complete(tmp_path / "out")


@pytest.mark.slow
def test_what_does_not_fit_is_refused_before_the_output_is_made(two_workers, finished, tmp_path, capsys):
    out = tmp_path / "out"
    for options, message in (
        (["--method", "attention-flow", "--packed"], "attention-flow takes no packed texts"),
        (["--model", str(tmp_path / "none")], "can't load model"),
        (["--num-gpus", "1"], "needs 1 GPUs, and the Ray cluster has 0"),
    ):
        assert run_on_ray(finished, out, *options) == 1
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1 and not out.exists()
    assert run_on_ray(finished, finished / "corpus" / "out") == 1
    assert "which is read" in capsys.readouterr().err


def test_a_worker_with_another_model_is_refused(finished):
    loading = {"model": str(finished / "model"), "device": "cpu"}
    facts = engine._facts(loading)
    assert engine._ShardWriter(loading, facts, None).error is None
    facts["model"]["sha256"] = "0"
    writer = engine._ShardWriter(loading, facts, None)
    error = from_row(writer(to_row(("a part", "its records")).to_pydict()))
    assert isinstance(error, ValueError) and "differ from those in another process" in str(error)


class Unpicklable(Exception):
    def __init__(self, one, two):
        super().__init__(one + two)


@pytest.mark.parametrize("error", [OSError(28, "full", "a"), Unpicklable("some", "thing")])
def test_exceptions_travel_as_rows(error):
    found = from_row(to_row(error).to_pydict())
    assert str(error) in str(found) and type(found) in (OSError, RuntimeError)


@pytest.mark.slow
def test_attributor_in_map_batches(two_workers, finished):
    arguments = dict(model=str(finished / "model"), keep=["id"])
    rows = [{"index": 7 * i, "id": i, "text": text, "label": 1} for i, text in enumerate(TEXTS)]
    found = two_workers.data.from_items(rows).map_batches(
        engine.Attributor,
        fn_constructor_kwargs=arguments,
        batch_size=8,
        compute=two_workers.data.ActorPoolStrategy(size=1),
    )
    found = {row["index"]: row for row in found.take_all()}
    whole = {row["index"]: row for row in pq.read_table(finished / "whole").to_pylist()}
    assert found.keys() == {row["index"] for row in rows}
    for index, row in found.items():
        expected = whole.get(index // 7)
        assert (row["reason"] is None) == (expected is not None) and row["text"] == TEXTS[index // 7]
        if expected is not None:
            names = ("tokens", "target", "label", "input", "method", "model", "cut")
            assert [row[name] for name in names] == [expected[name] for name in names]
            assert list(row["scores"]) == pytest.approx(expected["scores"], rel=1e-10)
