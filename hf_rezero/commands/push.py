"""Publish the folder of a finished run on the Hugging Face Hub, in one commit.

    hf-rezero push outputs/mine me/mine --dry_run
    hf-rezero push outputs/mine me/mine --private

Config, weights, code, tokenizer, card, reports and pictures go up; checkpoints, optimizer states and pickles do not.
The token is that of `hf auth login`, or HF_TOKEN.
"""

import argparse
from pathlib import Path

from ..publish.push import files_to_push, push_folder
from . import summary
from .entry import run_command


def main(argv: list[str] | None = None) -> str | None:
    """Push, or list what would be; returns the address of the commit or of the pull request."""
    parser = argparse.ArgumentParser(description=summary(__doc__))
    parser.add_argument("folder", type=Path, help="what a run, or save_pretrained, left")
    parser.add_argument("repo_id", help="owner/name, or name for a repository of your own; made if need be")
    parser.add_argument("--private", action="store_true", default=None, help="make the repository a private one")
    parser.add_argument("--revision", help="branch to push to; default: main")
    parser.add_argument("--create_pr", action="store_true", help="propose a pull request; needs no write access")
    parser.add_argument("--commit_message", default="Upload model")
    parser.add_argument("--dry_run", action="store_true", help="only list what would be published, and what would not")
    args = parser.parse_args(argv)
    if args.dry_run:
        return show(args.folder, files_to_push(args.folder))
    options = {name: getattr(args, name) for name in ("private", "revision", "create_pr", "commit_message")}
    commit = push_folder(args.folder, args.repo_id, **options)
    address = commit.pr_url or commit.commit_url
    print(f"published: {address}")
    return address


def show(folder: Path, names: list[str]) -> None:
    """Print the files that would go up, and what at the top of the folder would stay."""
    sizes = {name: (folder / name).stat().st_size for name in names}
    for name, size in sizes.items():
        print(f"{size:>14,}  {name}")
    print(f"{sum(sizes.values()):>14,}  bytes in {len(names)} files")
    if "README.md" not in names:
        print("README.md would be made, unless the repository has one")
    tops = {Path(name).parts[0] for name in names}
    left_out = sorted(path.name for path in folder.iterdir() if path.name not in tops)
    if left_out:
        print(f"left out: {', '.join(left_out)}")


if __name__ == "__main__":
    run_command(main)
