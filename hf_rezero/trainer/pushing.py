"""Pushing from the Trainer, in one commit."""

import os
import shutil
from concurrent.futures import Future
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import CommitInfo, HfApi
from transformers import Trainer
from transformers.trainer_utils import HubStrategy
from transformers.utils import PushInProgress

from ..publish.push import files_to_push, logger, one_clear_error, open_api, open_repository, push_folder


class PushingTrainer(Trainer):
    """The `Trainer`, with pushes of one commit that load without this library and hold no pickles and no tokens.

    transformers sends `training_args.bin`, with the token in it if `hub_token` was given, and during the training
    configs that name code without the code.
    """

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Make the repository before the training, which is the time to hear that it cannot be done.

        Raises:
            PushError: Not logged in, no write access, or the connection broke.
            ValueError: `hub_strategy` asks for checkpoints on the Hub.
        """
        if self.args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            raise ValueError(
                f"hub_strategy={self.args.hub_strategy.value} would publish optimizer states and pickles: use "
                f"'every_save', which publishes the model at every checkpoint, or 'end'."
            )
        if not self.is_world_process_zero():
            return
        name = self.args.hub_model_id or Path(self.args.output_dir).absolute().name
        private = self.args.hub_private_repo if private is None else private
        api = open_api(name, token or self.args.hub_token)
        with one_clear_error(name):
            self.hub_model_id = open_repository(api, name, private)
        self.push_in_progress = None

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs,
    ):
        """Save and publish model, tokenizer, code, card, reports and pictures in one commit; `kwargs` go to the card.

        Raises:
            PushError: Not logged in, no write access, or the connection broke.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self.save_model(_internal_call=True)
        tags = kwargs.pop("tags", None) or []
        tags = [tags] if isinstance(tags, str) else list(tags)
        kwargs["tags"] = tags + [tag for tag in getattr(self.model, "model_tags", None) or [] if tag not in tags]
        kwargs["model_name"] = kwargs.get("model_name") or (self.hub_model_id or "").split("/")[-1]
        self.create_model_card(**kwargs)
        if not self.is_world_process_zero():
            return None
        self._finish_current_push()
        options = {"revision": revision or self.args.hub_revision, "token": token or self.args.hub_token}
        options["commit_message"] = commit_message or "Upload model"
        if blocking:
            return push_folder(self.args.output_dir, self.hub_model_id, **options)
        return HfApi().run_as_future(push_folder, self.args.output_dir, self.hub_model_id, **options)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Publish the model of a checkpoint in the background, unless one is still on its way."""
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        busy = self.push_in_progress is not None and not self.push_in_progress.is_done()
        if busy and not self.args.hub_always_push:
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        try:
            copy = copy_model(checkpoint_folder, self.args.output_dir)
        except ValueError as error:
            logger.warning(f"not published: {error}")
            return
        options = {"revision": self.args.hub_revision, "token": self.args.hub_token}
        message = f"Training in progress, step {self.state.global_step}"
        job = HfApi().run_as_future(push_copy, copy, self.hub_model_id, commit_message=message, **options)
        job.add_done_callback(warn_if_refused)
        self.push_in_progress = PushInProgress([*(self.push_in_progress.jobs if busy else []), job])

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Save without the token, which `training_args.bin` would hold."""
        token, self.args.hub_token = self.args.hub_token, None
        try:
            super()._save(output_dir, state_dict)
        finally:
            self.args.hub_token = token


def copy_model(checkpoint: str | os.PathLike, beside: str | os.PathLike) -> TemporaryDirectory:
    """Hard links to the files of a checkpoint that belong on the Hub: it may be deleted before they are sent."""
    copy = TemporaryDirectory(prefix="_push-", dir=beside)
    for name in files_to_push(checkpoint):
        target = Path(copy.name, name)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            target.hardlink_to(Path(checkpoint, name))
        except OSError:  # the file system has no links
            shutil.copyfile(Path(checkpoint, name), target)
    return copy


def warn_if_refused(job: Future) -> None:
    """A push in the background must not end the training, and must not fail unnoticed."""
    if not job.cancelled() and job.exception() is not None:
        logger.warning(f"not published: {job.exception()}")


def push_copy(copy: TemporaryDirectory, repo_id: str, **options) -> CommitInfo:
    """Push and remove what `copy_model` made."""
    with copy as folder:
        return push_folder(folder, repo_id, with_card=False, **options)
