"""Stand-ins for `bd` (0.49.6 and 1.0.5) and `br` (0.7.6): what they print, traps included, over a small store.

`install(folder, "bd-0.49.6")` puts a program `bd` into a folder; `init(project)` makes `.beads`. A store is one JSON
file, changed under a lock. `fault(project, ...)` lets the next calls go wrong as the real ones were seen to.
Run as a program: `python beads_standin.py FLAVOUR ARGS...`.
"""
import fcntl
import json
import os
import re
import sys
import time

FLAVOURS = {"bd-0.49.6": "bd", "bd-1.0.5": "bd", "br-0.7.6": "br"}
STATUSES = ("open", "in_progress", "blocked", "deferred", "closed")
SHORT = {   # what br prints of an issue that a command changed
    "update": ("id", "title", "status", "priority", "assignee", "owner", "updated_at"),
    "close": ("id", "title", "status", "closed_at", "close_reason"),
}


def install(folder, flavour):
    """Put the stand-in of a flavour into a folder as the program that it stands for; returns its path."""
    path = os.path.join(str(folder), FLAVOURS[flavour])
    os.makedirs(str(folder), exist_ok=True)
    with open(path, "w") as f:
        f.write(f'#!/bin/sh\nexec "{sys.executable}" -I -S "{os.path.abspath(__file__)}" {flavour} "$@"\n')
    os.chmod(path, 0o755)
    return path


def init(project, prefix="t"):
    """Make an empty store in a project."""
    beads = os.path.join(str(project), ".beads")
    os.makedirs(beads, exist_ok=True)
    with open(os.path.join(beads, "store.json"), "w") as f:
        json.dump({"prefix": prefix, "next": 1, "issues": {}}, f)
    return beads


def fault(project, what, times=1):
    """Let the next `times` calls go wrong: `locked`, `text`, `silent`, `broken`, or `none`."""
    with open(os.path.join(str(project), ".beads", "fault.json"), "w") as f:
        json.dump({"what": what, "times": times}, f)


class Refusal(Exception):
    """The command says no: exit status, standard output, standard error."""

    def __init__(self, code, out, err):
        super().__init__(err or out)
        self.code, self.out, self.err = code, out, err


class Standin:
    """One call of the program."""

    def __init__(self, flavour, argv):
        self.flavour, self.name = flavour, FLAVOURS[flavour]
        self.old, self.br = flavour == "bd-0.49.6", flavour.startswith("br")
        self.words, self.flags = [], {}
        valued = {"--parent", "--limit", "--status", "--assignee", "--reason", "-r" if not self.br else "--epic", "-t",
                  "--type", "-d", "--description", "-p", "--priority", "--deps", "--actor", "--title",
                  "--acceptance"}
        rest = list(argv)
        while rest:
            word = rest.pop(0)
            if word in valued:
                self.flags[word] = rest.pop(0) if rest else ""
            elif word.startswith("-") and word != "-":
                self.flags[word] = True
            else:
                self.words.append(word)
        self.verb = self.words.pop(0) if self.words else ""
        self.actor = (self.flags.get("--actor") or os.environ.get("BD_ACTOR")
                      or (not self.br and os.environ.get("BEADS_ACTOR")) or os.environ.get("USER") or "unknown")
        self.now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())

    # -------------------------------------------------------------- the store

    def run(self, beads):
        """(exit status, standard output, standard error) of the call."""
        path = os.path.join(beads, "store.json")
        try:
            f = open(path, "r+")
        except OSError:
            return 1, "", "Error: no beads database found\n"
        with f:
            fcntl.flock(f, fcntl.LOCK_EX)
            if wrong := self.wrong(beads):
                return wrong
            self.store = json.load(f)
            self.issues = self.store["issues"]
            before = json.dumps(self.store)
            try:
                code, out = 0, self.do()
                err = ""
            except Refusal as e:
                code, out, err = e.code, e.out, e.err
            if json.dumps(self.store) != before:
                f.seek(0)
                f.truncate()
                json.dump(self.store, f)
        noise = "" if self.br else "warning: beads.role not configured\n"
        return code, out, noise + err

    def wrong(self, beads):
        """What a call prints that was made to go wrong."""
        path = os.path.join(beads, "fault.json")
        try:
            with open(path) as f:
                told = json.load(f)
        except OSError:
            return None
        if told["times"] <= 0:
            return None
        told["times"] -= 1
        with open(path, "w") as f:
            json.dump(told, f)
        error = json.dumps({"error": {"code": "DATABASE_ERROR", "message": "database is locked", "retryable": True}},
                           indent=2)
        return {"locked": (1, error + "\n", "") if self.br else (1, "", "Error: database is locked\n"),
                "text": (0, "Welcome to beads! Run `bd init` first.\n", ""),
                "silent": (0, "", "Error: something went wrong inside\n"),
                "broken": (1, '[{"id": "t-', "panic: runtime error\n")}.get(told["what"])

    def find(self, given):
        """The issue that a full or short id means, or None."""
        return self.issues.get(given) or next((i for k, i in self.issues.items() if k.rpartition("-")[2] == given), None)

    def get(self, given):
        found = self.find(given)
        if found is None:
            raise self.no_such(given)
        return found

    def no_such(self, given):
        text = f'no issue found matching "{given}"'
        if self.br:
            return Refusal(3, self.error("ISSUE_NOT_FOUND", f"Issue not found: {given}"), "")
        if self.old and self.verb != "close":
            return Refusal(0, "", f"Error fetching {given}: {text}\n")
        if self.verb in ("update",):
            return Refusal(1, "", f"Error resolving {given}: {text}\n")
        return Refusal(1, json.dumps({"error": text, "schema_version": 1}) + "\n", "")

    def error(self, code, message):
        return json.dumps({"error": {"code": code, "message": message, "hint": None, "retryable": code ==
                                     "VALIDATION_FAILED", "context": {}}}, indent=2) + "\n"

    def open_blockers(self, issue):
        """Whether the issue or one above it waits for something."""
        seen = set()
        while issue and issue["id"] not in seen:
            seen.add(issue["id"])
            for other, kind in issue["needs"]:
                if kind == "blocks" and self.issues[other]["status"] != "closed":
                    return True
            issue = self.issues.get(issue["parent"])
        return False

    def children(self, issue_id):
        return [i for i in self.issues.values() if i["parent"] == issue_id]

    def under(self, issue_id):
        return [x for c in self.children(issue_id) for x in (c, *self.under(c["id"]))]

    # -------------------------------------------------------------- what is printed

    def plain(self, issue):
        """The fields that every command prints of an issue."""
        shown = {k: issue[k] for k in ("id", "title", "description", "acceptance_criteria", "status", "priority",
                                       "issue_type", "assignee", "created_at", "updated_at", "closed_at",
                                       "close_reason") if issue.get(k) not in (None, "")}
        return {**shown, "priority": issue["priority"], "owner": "t@t"}

    def listed(self, issue):
        """An issue in a list."""
        shown = self.plain(issue)
        if self.flavour == "bd-1.0.5":
            links = [{"issue_id": issue["id"], "depends_on_id": o, "type": k, "created_at": self.now}
                     for o, k in self.links(issue)]
            shown.update({"dependencies": links} if links else {}, **({"parent": issue["parent"]} if issue["parent"]
                                                                      else {}))
        return shown

    def links(self, issue):
        return [*([(issue["parent"], "parent-child")] if issue["parent"] else ()), *map(tuple, issue["needs"])]

    def told(self, issue_id, kind):
        """Another issue, as `show` tells of it."""
        other = self.issues[issue_id]
        if self.br:
            return {**{k: other[k] for k in ("id", "title", "status", "priority")}, "dependency_type": kind}
        return {**self.plain(other), "dependency_type": kind}

    def shown(self, issue):
        """An issue as `show` prints it."""
        out = self.plain(issue)
        needs = [self.told(o, k) for o, k in self.links(issue)]
        needed = [self.told(i["id"], k) for i in self.issues.values() for o, k in self.links(i) if o == issue["id"]]
        if needs:
            out["dependencies"] = needs
        if self.flavour == "bd-1.0.5":
            out.update(dependent_count=len(needed), schema_version=1)
        elif needed:
            out["dependents"] = needed
        if issue["parent"]:
            out["parent"] = issue["parent"]
        return out

    def printed(self, value):
        if os.environ.get("BD_JSON_ENVELOPE") == "1" and self.flavour == "bd-1.0.5":
            value = {"schema_version": 1, "data": value}
        return json.dumps(value, indent=2 if self.old else None) + "\n"

    def limited(self, rows, default):
        limit = int(self.flags.get("--limit", default))
        return rows[:limit] if limit else rows

    # -------------------------------------------------------------- commands

    def do(self):
        """Standard output of the command."""
        handler = getattr(self, "do_" + self.verb, None)
        if handler is None:
            raise Refusal(2 if self.br else 1, "", f"error: unrecognized subcommand '{self.verb}'\n")
        out = handler()
        return out if "--json" in self.flags else f"{self.verb}: done\n"       # people get other words

    def do_list(self):
        if self.br and "--parent" in self.flags:
            raise Refusal(2, "", "error: unexpected argument '--parent' found\n\nUsage: br list [OPTIONS]\n")
        rows = list(self.issues.values())
        if "--parent" in self.flags:
            parent = self.find(self.flags["--parent"])
            rows = self.children(parent["id"]) if parent else []
        status = self.flags.get("--status")
        if status and status != "all":
            rows = [i for i in rows if i["status"] == status]
        elif "--all" not in self.flags and "-a" not in self.flags and not status:
            rows = [i for i in rows if i["status"] != "closed"]
        if "--type" in self.flags:
            rows = [i for i in rows if i["issue_type"] == self.flags["--type"]]
        shown = [self.listed(i) for i in self.limited(rows, 0 if self.br else 50)]
        if self.br:
            return self.printed({"issues": shown, "total": len(rows), "limit": 0, "offset": 0, "has_more": False})
        return self.printed(shown)

    def do_show(self):
        return self.printed([self.shown(self.get(self.words[0]))])

    def do_ready(self):
        if "-r" in self.flags and not self.br:
            raise Refusal(1, "", "Error: unknown shorthand flag: 'r' in -r\n")
        rows = list(self.issues.values())
        given = self.flags.get("--parent") or self.flags.get("--epic")
        if given:
            root = self.get(given) if self.br else self.find(given)
            deep = not self.br or "-r" in self.flags or "--epic" in self.flags
            rows = [] if not root else self.under(root["id"]) if deep else self.children(root["id"])
        rows = [i for i in rows if i["status"] == "open" and not self.open_blockers(i)]
        if self.br:
            rows = [i for i in rows if i["issue_type"] != "epic" or not [
                c for c in self.under(i["id"]) if c["status"] != "closed"]]
        counts = {} if self.br else {"dependency_count": 0, "dependent_count": 0, "comment_count": 0}
        rows = self.limited(rows, 0 if self.br else 10 if self.old else 100)
        return self.printed([{**self.plain(i), **counts} for i in rows])

    def do_update(self):
        issue = self.get(self.words[0])
        name = issue["id"]
        if "--claim" in self.flags:
            holder = issue["assignee"]
            if holder and (self.old or holder != self.actor):
                if self.br:
                    raise Refusal(4, self.error("VALIDATION_FAILED",
                                                f"claim: issue {name} already assigned to {holder}"), "")
                raise Refusal(0 if self.old else 1, "",
                              f"Error claiming {name}: issue already claimed by {holder}\n")
            issue.update(status="in_progress", assignee=self.actor)
        status = self.flags.get("--status")
        if status:
            if status not in STATUSES and not self.br:
                text = f"invalid status: {status}"
                raise Refusal(0, "", f"Error: {text}\n") if self.old else Refusal(
                    1, json.dumps({"error": text, "schema_version": 1}) + "\n", "")
            issue["status"] = status
        if "--assignee" in self.flags:
            issue["assignee"] = self.flags["--assignee"] or None
        issue["updated_at"] = self.now
        return self.changed(issue)

    def changed(self, issue):
        shown = self.plain(issue)
        return self.printed([{k: shown.get(k) for k in SHORT[self.verb]} if self.br else shown])

    def do_close(self):
        issue = self.get(self.words[0])
        name = issue["id"]
        left = [c["id"] for c in self.under(name) if c["status"] != "closed"] if issue["issue_type"] == "epic" else []
        if self.br and (issue["status"] == "closed" or left and "--force" not in self.flags):
            reason = "already closed" if issue["status"] == "closed" else f"{len(left)} open children"
            raise Refusal(3, json.dumps({"closed": [], "skipped": [{"id": name, "reason": reason}]}) + "\n"
                          + self.error("NOTHING_TO_DO", "Nothing to do"), "")
        if left and not self.old and "--force" not in self.flags:
            raise Refusal(1, "", f"Error: cannot close epic {name}: {len(left)} open child issue(s)\n")
        reason = self.flags.get("--reason") or "Closed"
        issue.update(status="closed", closed_at=self.now, close_reason=reason, updated_at=self.now)
        return self.changed(issue)

    def do_reopen(self):
        issue = self.get(self.words[0])
        if issue["status"] != "closed" and not self.br:
            raise Refusal(0, "", "")
        changed = issue["status"] == "closed"
        issue.update(status="open", closed_at=None, close_reason=None)
        if self.br:
            return self.printed({"reopened": [{"id": issue["id"]}] if changed else [],
                                 "skipped": [] if changed else [{"id": issue["id"]}]})
        return self.printed([self.plain(issue)])

    def do_create(self):
        parent = self.get(self.flags["--parent"])["id"] if "--parent" in self.flags else None
        if parent:
            used = [int(k[len(parent) + 1:]) for k in self.issues if re.fullmatch(re.escape(parent) + r"\.\d+", k)]
            name = f"{parent}.{max(used, default=0) + 1}"
        else:
            name = f"{self.store['prefix']}-{self.store['next']:03x}"
            self.store["next"] += 1
        needs = [[self.get(d)["id"], "blocks"] for d in str(self.flags.get("--deps", "")).split(",") if d]
        self.issues[name] = {
            "id": name, "title": " ".join(self.words), "status": "open", "assignee": None, "parent": parent,
            "description": self.flags.get("-d") or self.flags.get("--description") or "",
            "acceptance_criteria": self.flags.get("--acceptance") or "", "needs": needs, "comments": [],
            "priority": int(self.flags.get("-p") or self.flags.get("--priority") or 2),
            "issue_type": self.flags.get("-t") or self.flags.get("--type") or "task", "created_at": self.now,
            "updated_at": self.now, "closed_at": None, "close_reason": None}
        return self.printed({**self.plain(self.issues[name]), **({"dependencies": []} if self.br else {})})

    def do_dep(self):
        kind = self.flags.get("--type", "blocks")
        issue, other = self.get(self.words[1]), self.get(self.words[2])
        if self.br and issue is other:
            raise Refusal(5, self.error("SELF_DEPENDENCY", "cannot depend on itself"), "")
        if kind == "parent-child":
            issue["parent"] = other["id"]
        else:
            issue["needs"].append([other["id"], kind])
        told = {"issue_id": issue["id"], "depends_on_id": other["id"], "type": kind}
        return self.printed({"status": "ok", **told, "action": "added"} if self.br else {"status": "added", **told})

    def do_comments(self):
        if self.words[0] == "add":
            issue = self.get(self.words[1])
            issue["comments"].append({"id": len(issue["comments"]) + 1, "issue_id": issue["id"],
                                      "author": self.actor, "text": self.words[2], "created_at": self.now})
            return self.printed(issue["comments"][-1])
        return self.printed(self.get(self.words[0])["comments"])

    def do_where(self):
        beads = os.environ.get("BEADS_DIR", ".beads")
        return self.printed({"path": beads, "prefix": self.store["prefix"], "database_path": f"{beads}/store.json"})


def find_beads():
    """`BEADS_DIR`, else the nearest `.beads` above the current folder."""
    if os.environ.get("BEADS_DIR"):
        return os.environ["BEADS_DIR"]
    at = os.getcwd()
    while not os.path.isdir(os.path.join(at, ".beads")) and os.path.dirname(at) != at:
        at = os.path.dirname(at)
    return os.path.join(at, ".beads")


def main():
    code, out, err = Standin(sys.argv[1], sys.argv[2:]).run(find_beads())
    sys.stdout.write(out)
    sys.stderr.write(err)
    return code


if __name__ == "__main__":
    sys.exit(main())
