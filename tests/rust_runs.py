"""Run folders as the Rust tool writes them: no journal, no lock, records without the keys that came later.

Nothing here imports pitboss.
"""
from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

RUN = "019d9900-aaaa-7000-8000-000000000001"
DATA = Path(__file__).resolve().parent / "data" / "claude"


def record(name: str, status: str = "Success", **more) -> dict:
    """One TaskRecord with the keys of version 0.5, for a run folder that `more` may say."""
    return {"task_id": name, "status": status, "exit_code": 0 if status == "Success" else 1,
            "started_at": "2026-04-16T17:48:00.123456Z", "ended_at": "2026-04-16T17:49:30.123456Z", "duration_ms": 90000,
            "worktree_path": None, "log_path": None,
            "token_usage": {"input": 1000, "output": 2000, "cache_read": 10000, "cache_creation": 0},
            "claude_session_id": f"session-{name}", "final_message_preview": f"{name} is done.", **more}


class RustRun:
    """A run folder under construction; each method adds what the Rust tool would have written by then."""

    def __init__(self, runs: Path, manifest: Path, tasks: dict[str, dict], run_id: str = RUN, lead: dict | None = None,
                 run_dir: Path | None = None) -> None:
        self.path = (run_dir or runs) / run_id
        self.path.mkdir(parents=True)
        self.run_id, self.manifest = run_id, manifest
        shutil.copyfile(manifest, self.path / "manifest.snapshot.toml")
        plans = [{"id": name, "prompt": "x", "branch": None, "model": "claude-haiku-4-5", "effort": "high", "tools": [],
                  "timeout_secs": 3600, "use_worktree": True, "env": {}, "resume_session_id": None, **plan}
                 for name, plan in tasks.items()]
        self.write("resolved.json", {"max_parallel": 4, "halt_on_failure": False, "run_dir": str(run_dir or runs),
                                     "worktree_cleanup": "on_success", "emit_event_stream": False, "tasks": plans,
                                     "lead": lead, "max_workers": 4 if lead else None})
        self.write("meta.json", {"run_id": run_id, "manifest_path": str(manifest), "pitboss_version": "0.5.0",
                                 "claude_version": "2.1.100", "started_at": "2026-04-16T17:48:00.123456Z", "env": {}})

    def write(self, name: str, value: dict) -> None:
        (self.path / name).write_text(json.dumps(value, indent=2))

    def begin(self, name: str, sample: str = "plain.jsonl", folder: Path | None = None) -> Path:
        """An actor's agent has started and printed what a sample holds; returns its log."""
        task = (folder or self.path) / "tasks" / name
        task.mkdir(parents=True)
        shutil.copyfile(DATA / sample, task / "stdout.log")
        (task / "stderr.log").touch()
        return task / "stdout.log"

    def settle(self, *records: dict, joined: bool = False) -> None:
        """Records of settled actors; `joined`: on one line, as runs with a lead have them."""
        with open(self.path / "summary.jsonl", "a") as f:
            f.write("".join(json.dumps(r) + ("" if joined else "\n") for r in records))

    def finish(self, *records: dict) -> None:
        """The run has come to its end."""
        self.settle(*records)
        failed = sum(r["status"] != "Success" for r in records)
        self.write("summary.json", {"run_id": self.run_id, "manifest_path": str(self.manifest), "pitboss_version": "0.5.0",
                                    "claude_version": "2.1.100", "started_at": "2026-04-16T17:48:00.123456Z",
                                    "ended_at": "2026-04-16T17:49:31.123456Z", "total_duration_ms": 91000,
                                    "tasks_total": len(records), "tasks_failed": failed, "was_interrupted": False,
                                    "tasks": list(records)})

    def age(self, seconds: float) -> None:
        """Nothing in the folder has changed for so long."""
        for folder, _, files in os.walk(self.path):
            for name in files:
                stat = os.stat(os.path.join(folder, name))
                os.utime(os.path.join(folder, name), (stat.st_atime - seconds, stat.st_mtime - seconds))

    def contents(self) -> dict[str, bytes]:
        """Every file of the folder, to see that nothing was written to it."""
        return {str(p.relative_to(self.path)): p.read_bytes() for p in sorted(self.path.rglob("*")) if p.is_file()}
