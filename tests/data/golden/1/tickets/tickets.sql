PRAGMA user_version=3;
BEGIN TRANSACTION;
CREATE TABLE comments (id INTEGER PRIMARY KEY, issue_id TEXT NOT NULL, author TEXT NOT NULL,
                              text TEXT NOT NULL, created_at TEXT NOT NULL);
CREATE TABLE issues (
           id TEXT PRIMARY KEY, title TEXT NOT NULL, description TEXT NOT NULL,
           acceptance_criteria TEXT NOT NULL, status TEXT NOT NULL, priority INTEGER NOT NULL,
           issue_type TEXT NOT NULL, assignee TEXT, created_at TEXT NOT NULL, updated_at TEXT NOT NULL,
           closed_at TEXT, close_reason TEXT, rest TEXT NOT NULL);
INSERT INTO "issues" VALUES('repo-auth','Auth','','','open',2,'epic',NULL,'2026-11-22T00:25:56.187Z','2026-11-22T00:25:56.187Z',NULL,NULL,'{}');
INSERT INTO "issues" VALUES('repo-pay','Pay','','','open',2,'epic',NULL,'2026-11-22T00:25:56.729Z','2026-11-22T00:25:56.729Z',NULL,NULL,'{}');
INSERT INTO "issues" VALUES('repo-pay.2','Pay 2','$ write f4.txt 4
$ commit work 4','','open',2,'task',NULL,'2026-11-22T00:25:56.729Z','2026-11-22T00:25:56.729Z',NULL,NULL,'{}');
INSERT INTO "issues" VALUES('repo-pay.1','Pay 1','$ leave Which file?','','in_progress',2,'task','pit/pay','2026-11-22T00:25:56.729Z','2026-11-22T00:25:58.348Z',NULL,NULL,'{}');
INSERT INTO "issues" VALUES('repo-auth.1','Auth 1','$ write f1.txt 1
$ commit work 1','','closed',2,'task','pit/auth','2026-11-22T00:25:56.187Z','2026-11-22T00:25:59.201Z','2026-11-22T00:25:59.201Z','Closed','{}');
INSERT INTO "issues" VALUES('repo-auth.2','Auth 2','$ write f2.txt 2
$ commit work 2','','closed',2,'task','pit/auth','2026-11-22T00:25:56.187Z','2026-11-22T00:26:00.994Z','2026-11-22T00:26:00.994Z','Closed','{}');
CREATE TABLE links (issue_id TEXT NOT NULL, depends_on_id TEXT NOT NULL, type TEXT NOT NULL,
                           rest TEXT NOT NULL, PRIMARY KEY (issue_id, depends_on_id, type));
INSERT INTO "links" VALUES('repo-pay.2','repo-pay','parent-child','{}');
INSERT INTO "links" VALUES('repo-pay.2','repo-pay.1','blocks','{}');
INSERT INTO "links" VALUES('repo-pay.1','repo-pay','parent-child','{}');
INSERT INTO "links" VALUES('repo-auth.1','repo-auth','parent-child','{}');
INSERT INTO "links" VALUES('repo-auth.2','repo-auth','parent-child','{}');
INSERT INTO "links" VALUES('repo-auth.2','repo-auth.1','blocks','{}');
COMMIT;
