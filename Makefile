# make test          every quick test that needs no agent program; TESTS="FILE ..." and ARGS="-k NAME" choose
# make lint          the shape of pitboss.py: its map, sections, sizes and imports
# make bench         what pitboss costs beside a plain program that does the same (ARGS="--quick")
# make proof         tries to break every promise, a figure each; SCALE=1 is the full table, ROWS="R1 R3" chooses
# make check-claude  the tests that drive a real claude against a fake API; PITBOSS_TEST_CLAUDE names it
# make check-shells  the tests that type into real shells: bash, zsh, fish, elvish, those there are
# make check-agents  the same with opencode, codex and gemini; PITBOSS_TEST_OPENCODE and so on name them
#
# PYTHON=... names the Python; without it the first one of at least 3.11 is taken. Where it has no pytest,
# one is installed into a virtual environment under ~/.cache/pitboss-tests, outside the checkout.

unexport PYTHONDONTWRITEBYTECODE       # pytest would rewrite every test file at each of its starts

TESTS ?= tests
CACHE := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/pitboss-tests
IS_NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))
PYTHON := $(shell for p in python3 python3.14 python3.13 python3.12 python3.11 python; do \
	"$$p" -c '$(IS_NEW_ENOUGH)' 2>/dev/null && "$$p" -c 'import sys; print(sys.executable)' && break; done)

define need_python
py='$(PYTHON)'; "$${py:-false}" -c '$(IS_NEW_ENOUGH)' 2>/dev/null || { \
	echo 'Python 3.11 or newer is needed. Say where one is: make $@ PYTHON=/path/to/python3' >&2; exit 2; };
endef

# Leaves in $$py a Python that has pytest.
define with_pytest
$(need_python) \
if ! "$$py" -c 'import pytest' 2>/dev/null; then \
	venv='$(CACHE)'/$$("$$py" -c 'import sys; print("py%d.%d" % sys.version_info[:2])'); \
	if ! "$$venv/bin/python" -c 'import pytest' 2>/dev/null; then \
		echo "$$py has no pytest: installing it into $$venv" >&2; \
		"$$py" -m venv --clear "$$venv" && "$$venv/bin/python" -m pip install -q pytest || { \
			echo "That failed. Install pytest yourself ($$py -m pip install pytest, or your system's" >&2; \
			echo "python3-pytest package), or name a Python that has it: make $@ PYTHON=/path/to/python3" >&2; \
			exit 2; }; \
	fi; \
	py="$$venv/bin/python"; \
fi
endef

SCALE ?= 0.2

.PHONY: test lint bench proof check-claude check-agents check-shells print-python

# Four parts at once, for a test waits about as long as it works; 5 is pytest's word for "no test was chosen".
test:
	@$(with_pytest); logs=$$(mktemp -d); bad=0; \
	run() { PITBOSS_TEST_SHARD=$$1/4 "$$py" -m pytest -q -m 'not slow and not real' $(TESTS) $(ARGS); }; \
	for n in 1 2 3; do { run $$n >"$$logs/$$n" 2>&1; echo $$? >"$$logs/$$n.status"; } & done; \
	run 0; echo $$? >"$$logs/0.status"; wait; cat "$$logs/1" "$$logs/2" "$$logs/3"; \
	case $$(cat "$$logs"/?.status | sort -u | tr -d '\n') in 0|05) ;; *) bad=1 ;; esac; \
	rm -rf "$$logs"; exit $$bad

lint:
	@$(with_pytest); "$$py" -m pytest -q tests/test_shape.py $(ARGS)

bench:
	@$(need_python) "$$py" tests/bench/bench.py $(ARGS)

proof:
	@$(with_pytest); "$$py" tests/chaos/proof.py --scale $(SCALE) --rows "$(ROWS)" $(ARGS)

print-python:
	@$(need_python) echo "$$py"

check-shells:
	@$(with_pytest); "$$py" -m pytest -q -m real tests/test_shells.py $(ARGS)

check-claude:
	@PITBOSS_TEST_CLAUDE=$${PITBOSS_TEST_CLAUDE:-$$(command -v claude)}; export PITBOSS_TEST_CLAUDE; \
	[ -n "$$PITBOSS_TEST_CLAUDE" ] || { \
		echo 'No claude here: put it on PATH, or make $@ PITBOSS_TEST_CLAUDE=/path/to/claude' >&2; exit 2; }; \
	$(with_pytest); "$$py" -m pytest -q -m real --ignore=tests/test_shells.py --ignore=tests/test_agents.py \
		$(TESTS) $(ARGS)

# Those that are missing are skipped; -rs says so.
check-agents:
	@$(with_pytest); "$$py" -m pytest -q -rs -m real tests/test_agents.py $(ARGS)
