"""The callback under a real Trainer: exact, and a resumed run ends as the uninterrupted one."""

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from mgpp import select_prunable
from mgpp.integrations.transformers import PruningCallback

CONFIG = {"sparsity": 0.8, "initial_sparsity": 0.2, "start_after": 3, "finetune": 4, "interval": 2}


def make_trainer(tiny_bert, folder, callbacks, **changes):
    torch.manual_seed(0)
    rows = [{"input_ids": torch.tensor([2, 5 + i % 16, 3]), "labels": i % 2} for i in range(80)]
    arguments = TrainingArguments(
        str(folder),
        max_steps=20,
        save_steps=10,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        **changes,
    )
    model = AutoModelForSequenceClassification.from_pretrained(tiny_bert)
    return Trainer(
        model=model, args=arguments, train_dataset=rows, eval_dataset=rows, callbacks=callbacks
    )


def weights_of(trainer):
    return torch.cat([p.detach().view(-1) for p in trainer.model.parameters()])


@pytest.mark.slow
def test_a_resumed_training_ends_as_the_uninterrupted_one(tiny_bert, tmp_path):
    whole = PruningCallback(CONFIG)
    trainer = make_trainer(tiny_bert, tmp_path, [whole])
    trainer.train()
    resumed = PruningCallback(CONFIG)
    again = make_trainer(tiny_bert, tmp_path, [resumed])
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))
    assert torch.equal(weights_of(trainer), weights_of(again))
    assert whole.pruner.mask_hash() == resumed.pruner.mask_hash()
    assert resumed.pruner.num_zeros() == int(resumed.pruner.num_prunable * 0.8)


@pytest.mark.slow
@pytest.mark.parametrize("best", [False, True])
def test_sparse_transfer_keeps_the_zeros_exactly(tiny_bert, tmp_path, best):
    """Also in the checkpoints, and in the best of them."""
    upstream = AutoModelForSequenceClassification.from_pretrained(tiny_bert)
    names = select_prunable(upstream)
    with torch.no_grad():
        for name in names:
            weight = upstream.get_parameter(name)
            weight[weight.abs() < weight.abs().median()] = 0.0
    upstream.save_pretrained(tmp_path / "upstream")
    masks = {name: upstream.get_parameter(name) != 0 for name in names}
    changes = {}
    if best:
        changes = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 10}
    ended = []
    for resumed in (None, str(tmp_path / "out" / "checkpoint-10")):
        callback = PruningCallback({"method": "sparse-transfer"})
        trainer = make_trainer(tmp_path / "upstream", tmp_path / "out", [callback], **changes)
        trainer.train(resume_from_checkpoint=resumed)
        for name, mask in masks.items():
            assert torch.equal(trainer.model.get_parameter(name) != 0, mask), name
        assert callback.pruner.num_zeros() == callback.pruner.last_pruning.num_pruned
        ended.append(weights_of(trainer))
    assert torch.equal(*ended)
    saved = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "checkpoint-20")
    assert all(torch.equal(saved.get_parameter(name) != 0, masks[name]) for name in names)


@pytest.mark.slow
def test_a_checkpoint_without_the_pruner_is_refused(tiny_bert, tmp_path):
    make_trainer(tiny_bert, tmp_path, []).train()
    again = make_trainer(tiny_bert, tmp_path, [PruningCallback(CONFIG)])
    with pytest.raises(ValueError, match=r"mgpp_pruner\.pt is missing"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))


def test_a_checkpoint_of_another_target_is_refused(tiny_bert, tmp_path):
    make_trainer(tiny_bert, tmp_path, [PruningCallback(CONFIG)]).train()
    other = PruningCallback({**CONFIG, "sparsity": 0.9})
    again = make_trainer(tiny_bert, tmp_path, [other])
    with pytest.raises(ValueError, match=r"saved with final_sparsity 0\.8 \(here 0\.9\)"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))


class Stopping(TrainerCallback):
    """Stops as early stopping does."""

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 12


def test_a_training_that_stops_early_is_warned_of(tiny_bert, tmp_path):
    callback = PruningCallback(CONFIG)
    trainer = make_trainer(tiny_bert, tmp_path, [callback, Stopping()])
    with pytest.warns(UserWarning, match="not pruned as asked for: the training ended after 12"):
        trainer.train()
    zeros = sum(int((p == 0).sum()) for p in trainer.model.parameters())
    assert callback.pruner.num_zeros() <= zeros < 0.1 * callback.pruner.num_prunable


BEST = {"load_best_model_at_end": True, "metric_for_best_model": "loss"}


def test_the_best_model_is_refused_where_it_may_be_one_before_the_last_pruning(tiny_bert, tmp_path):
    for late in ({"eval_strategy": "steps", "eval_steps": 5, "eval_delay": 15}, None):
        early = {"eval_strategy": "steps", "eval_steps": 10}
        callback = PruningCallback(CONFIG)
        trainer = make_trainer(tiny_bert, tmp_path, [callback], **BEST, **(late or early))
        with pytest.raises(ValueError, match=r"may hand back a model of before.*eval_delay=16"):
            trainer.train()
    # The last pruning is step 15, counted from 0, so that after 16 steps the mask is final.
    callback = PruningCallback(CONFIG)
    late = {"eval_strategy": "steps", "eval_steps": 10, "eval_delay": 16}
    trainer = make_trainer(tiny_bert, tmp_path, [callback], **BEST, **late)
    trainer.train()
    assert callback.pruner.finish() == callback.pruner.mask_sparsity


def test_a_second_training_under_one_optimizer_is_refused(tiny_bert, tmp_path):
    trainer = make_trainer(tiny_bert, tmp_path, [PruningCallback(CONFIG)])
    trainer.train()
    with pytest.raises(ValueError, match="pruned already under this optimizer"):
        trainer.train()
