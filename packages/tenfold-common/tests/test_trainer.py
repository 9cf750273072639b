"""Checkpoints are complete or unused, logs go on where a checkpoint was, signals stop cleanly."""

import json
import os
import signal
import subprocess
import sys
import threading

import pytest
import torch
from safetensors import SafetensorError
from torch.utils.data import Dataset
from transformers import PrinterCallback, Trainer, TrainingArguments

from tenfold_common.atomic import check_output_file, is_complete, locked_folder, write_json
from tenfold_common.errors import CheckpointError, UserError
from tenfold_common.tiny import tiny_llama
from tenfold_common.trainer import (
    AtomicCheckpoints,
    MetricsFile,
    StopOnSignal,
    Stopped,
    delete_folder,
    disk_errors,
    resume_point,
    train_to_the_end,
)


class Rows(Dataset):
    def __len__(self):
        return 64

    def __getitem__(self, index):
        ids = torch.arange(index, index + 8) % 20
        return {"input_ids": ids, "labels": ids}


class AtomicTrainer(AtomicCheckpoints, Trainer):
    pass


def trainer(folder, *, steps=6, callbacks=(), **named):
    arguments = TrainingArguments(
        str(folder), max_steps=steps, save_steps=2, logging_steps=1, use_cpu=True, seed=0,
        per_device_train_batch_size=4, report_to="none", disable_tqdm=True,
        dataloader_pin_memory=False,
    )  # fmt: skip
    made = AtomicTrainer(
        model=tiny_llama(20, hidden=8, heads=2, kv_heads=2, layers=1),
        args=arguments,
        train_dataset=Rows(),
        callbacks=list(callbacks),
        **named,
    )
    made.remove_callback(PrinterCallback)
    return made


def losses(path):
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [(row["step"], row["loss"]) for row in rows if "loss" in row]


def test_checkpoints_are_complete_and_the_newest_are_kept(tmp_path):
    trainer(tmp_path, keep=2).train()
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]
    assert all(is_complete(p) for p in tmp_path.glob("checkpoint-*"))
    assert not list(tmp_path.rglob("training_args.bin"))


def test_a_resumed_run_logs_what_an_uninterrupted_one_does(tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for folder in (whole, cut):
        folder.mkdir()
    trainer(whole, callbacks=[MetricsFile(whole / "m.jsonl")]).train()
    trainer(cut, callbacks=[MetricsFile(cut / "m.jsonl")]).train()
    file = cut / "m.jsonl"
    file.write_text(file.read_text() + '{"half a li')
    delete_folder(cut / "checkpoint-6")
    trainer(cut, callbacks=[MetricsFile(file)]).train(
        resume_from_checkpoint=str(cut / "checkpoint-4")
    )
    assert losses(file) == losses(whole / "m.jsonl")
    assert [step for step, _ in losses(file)] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("keep", [0, 1])
def test_one_checkpoint_is_too_few(tmp_path, keep):
    with pytest.raises(UserError, match=f"keep is {keep}"):
        trainer(tmp_path, keep=keep)


def test_the_trainer_s_own_deletion_is_refused(tmp_path):
    arguments = TrainingArguments(str(tmp_path), save_total_limit=3, use_cpu=True)
    with pytest.raises(UserError, match="save_total_limit"):
        AtomicTrainer(
            model=tiny_llama(20, hidden=8, heads=2, kv_heads=2, layers=1),
            args=arguments,
            train_dataset=Rows(),
        )


def test_deleting_takes_the_marker_first(tmp_path, monkeypatch):
    folder = tmp_path / "checkpoint-1"
    folder.mkdir()
    for name in ("COMPLETE", "weights"):
        (folder / name).write_text("x")

    def killed(path):
        assert not (folder / "COMPLETE").exists()
        raise KeyboardInterrupt

    monkeypatch.setattr("shutil.rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        delete_folder(folder)
    assert (folder / "weights").exists()


class TestTrainToTheEnd:
    def test_no_step_after_the_last(self, tmp_path):
        train_to_the_end(trainer(tmp_path))
        again = trainer(tmp_path)
        taken = []
        step = again.training_step
        again.training_step = lambda *a, **k: taken.append(1) or step(*a, **k)
        train_to_the_end(again, tmp_path / "checkpoint-6")
        assert taken == []
        assert again.state.global_step == 6
        again = trainer(tmp_path)
        step = again.training_step
        again.training_step = lambda *a, **k: taken.append(1) or step(*a, **k)
        train_to_the_end(again, tmp_path / "checkpoint-4")
        assert len(taken) == 2

    def test_saves_as_often_as_asked_for_now(self, tmp_path):
        train_to_the_end(trainer(tmp_path, steps=6))
        for gone in (tmp_path / "checkpoint-4", tmp_path / "checkpoint-6"):
            delete_folder(gone)
        again = trainer(tmp_path, keep=9)
        again.args.save_steps = 3
        train_to_the_end(again, resume_point(tmp_path))
        assert {p.name for p in tmp_path.glob("checkpoint-*")} == {
            "checkpoint-3", "checkpoint-6"
        }  # fmt: skip

    def test_a_signal_saves_and_is_told(self, tmp_path):
        made = trainer(tmp_path)
        step = made.training_step

        def signalled(*arguments, **named):
            if made.state.global_step == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            return step(*arguments, **named)

        made.training_step = signalled
        with pytest.raises(Stopped) as raised:
            train_to_the_end(made)
        assert raised.value.number == signal.SIGTERM
        assert is_complete(tmp_path / "checkpoint-3")
        assert resume_point(tmp_path) == tmp_path / "checkpoint-3"


class TestResumePoint:
    def test_incomplete_ones_are_passed_over(self, tmp_path, caplog):
        assert resume_point(tmp_path) is None
        assert "starting from the first step" in caplog.text
        train_to_the_end(trainer(tmp_path, steps=4))
        (tmp_path / "checkpoint-9").mkdir()
        assert resume_point(tmp_path) == tmp_path / "checkpoint-4"
        assert "skipping checkpoint-9" in caplog.text

    def test_damage_is_not_a_fresh_start(self, tmp_path):
        train_to_the_end(trainer(tmp_path, steps=2))
        (tmp_path / "checkpoint-2" / "model.safetensors").write_bytes(b"short")
        with pytest.raises(CheckpointError, match=r"damaged: .*model\.safetensors"):
            resume_point(tmp_path)


class TestDiskErrors:
    @pytest.mark.parametrize(
        "error",
        [
            SafetensorError("I/O error: No space left on device (os error 28)"),
            RuntimeError("[enforce fail at inline_container.cc:815] . unexpected pos 64 vs 0"),
        ],
    )
    def test_full_disk(self, error, tmp_path):
        with pytest.raises(UserError, match="disk may be full") as raised, disk_errors(tmp_path):
            raise error
        assert str(tmp_path) in str(raised.value)

    def test_other_errors_pass(self, tmp_path):
        with pytest.raises(RuntimeError, match="shapes"), disk_errors(tmp_path):
            raise RuntimeError("shapes do not match")


class TestSignals:
    def test_the_first_saves_and_stops_at_a_log(self, tmp_path):
        stop = StopOnSignal()
        made = trainer(tmp_path, callbacks=[stop])
        with stop.listening():
            os.kill(os.getpid(), signal.SIGTERM)
            made.train()
        assert stop.received == signal.SIGTERM
        assert made.state.global_step == 1
        assert is_complete(tmp_path / "checkpoint-1")

    def test_the_second_stops_at_once(self):
        def twice():
            with StopOnSignal().listening():
                os.kill(os.getpid(), signal.SIGINT)
                os.kill(os.getpid(), signal.SIGINT)

        with pytest.raises(Stopped) as raised:
            twice()
        assert raised.value.number == signal.SIGINT
        assert isinstance(raised.value, KeyboardInterrupt)

    def test_old_handlers_come_back(self):
        before = signal.getsignal(signal.SIGTERM)
        with StopOnSignal().listening():
            assert signal.getsignal(signal.SIGTERM) != before
        assert signal.getsignal(signal.SIGTERM) == before

    def test_other_threads_leave_handlers_alone(self):
        before = signal.getsignal(signal.SIGTERM)
        seen = []

        def other():
            with StopOnSignal().listening():
                seen.append(signal.getsignal(signal.SIGTERM))

        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert seen == [before]


class TestFiles:
    def test_a_lock_keeps_others_out_and_ends_with_its_process(self, tmp_path):
        code = (
            "import sys, time; from tenfold_common.atomic import locked_folder\n"
            "with locked_folder(sys.argv[1]):\n    print('held', flush=True); time.sleep(60)"
        )
        with subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE
        ) as holder:
            assert holder.stdout.readline() == b"held\n"
            with pytest.raises(UserError, match="another run is writing"), locked_folder(tmp_path):
                pass
            holder.kill()
        with locked_folder(tmp_path / "new") as folder:
            assert folder.is_dir()
        with locked_folder(tmp_path):
            pass

    def test_a_file_cannot_be_locked(self, tmp_path):
        (tmp_path / "f").write_text("x")
        with pytest.raises(UserError, match="is a file"), locked_folder(tmp_path / "f"):
            pass

    def test_json_is_written_whole(self, tmp_path):
        write_json(tmp_path / "x.json", {"ä": [1, None]})
        assert json.loads((tmp_path / "x.json").read_text(encoding="utf-8")) == {"ä": [1, None]}
        with pytest.raises(TypeError):
            write_json(tmp_path / "x.json", {"a": object()})
        assert json.loads((tmp_path / "x.json").read_text(encoding="utf-8")) == {"ä": [1, None]}

    def test_output_files_are_checked_before_the_work(self, tmp_path):
        check_output_file(tmp_path / "x.json")
        with pytest.raises(UserError, match="is a directory"):
            check_output_file(tmp_path)
        with pytest.raises(UserError, match="there is no folder"):
            check_output_file(tmp_path / "no" / "x.json")
