"""The callback under a real Trainer: exact, and a resumed run ends as the uninterrupted one."""

import pytest
import torch
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments

from pipeline.trainer_callback import PruningCallback

CONFIG = {"sparsity": 0.8, "initial_sparsity": 0.2, "warmup": 3, "finetune": 4, "interval": 2}


def make_trainer(tiny_bert, folder, callbacks):
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
    )
    model = AutoModelForSequenceClassification.from_pretrained(tiny_bert)
    return Trainer(model=model, args=arguments, train_dataset=rows, callbacks=callbacks)


def weights_of(trainer):
    return torch.cat([p.detach().view(-1) for p in trainer.model.parameters()])


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


def test_a_checkpoint_without_the_pruner_is_refused(tiny_bert, tmp_path):
    make_trainer(tiny_bert, tmp_path, []).train()
    again = make_trainer(tiny_bert, tmp_path, [PruningCallback(CONFIG)])
    with pytest.raises(ValueError, match=r"mgpp_pruner\.pt is missing"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))
