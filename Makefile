# make demo | make test | make bench | make data | make soak: each builds .venv itself when it is missing or setup.cfg has changed.
# Needs Python 3.11; `make PYTHON=/path/to/python3.11 ...` names another one.
PYTHON ?= python3.11
RUN := .venv/bin/python
INSTALLED := .venv/.installed

.PHONY: demo test bench data soak clean

demo: $(INSTALLED)
	$(RUN) -m apps.image.classification --dataset=mnist_5k --dtype_policy=mixed_float16 --workdir=runs/demo
	$(RUN) -m apps.predict --saved_model=saved_models/image_classification_mnist_5k runs/demo/examples

test: $(INSTALLED)
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	$(RUN) -m pytest

data: $(INSTALLED)
	$(RUN) -m apps.data --dataset=mnist_5k,fashion_mnist,deepforest,blue_marble,composites
	$(RUN) -m apps.data --dataset=reuters_r8,reuters_r52,newsgroups_20,vader_movies,vader_tweets,vader_amazon,vader_nyt
	$(RUN) -m apps.data --dataset=bible_en_es,gnome_docs/de,gnome_docs/fr,gnome_docs/ru
	$(RUN) -m apps.data --dataset=fillets_cs,fillets_nl,gcin_tones,fillets_noisy,spoken_words_en

# The short form of what RESULTS.md shows; 30 rounds or more are for claims.
bench: $(INSTALLED)
	$(RUN) -m pip install --disable-pip-version-check --quiet --editable '.[dev,bench]'
	$(RUN) -m benchmarks.training --network=resnet --rounds=5
	$(RUN) -m benchmarks.training --network=encoder --rounds=5
	$(RUN) -m benchmarks.inference --network=resnet --rounds=10
	$(RUN) -m benchmarks.inference --network=encoder --rounds=10

# Long campaigns: kills at random moments, overflows on two replicas, contracts in float32 and bfloat16.
soak: $(INSTALLED)
	$(RUN) -m pytest -m soak --numprocesses=0 -s

clean:
	rm -rf .venv *.egg-info

# Debian's python3.11 comes without venv's pip; as root it is installed, else the error says what to do.
$(INSTALLED): setup.cfg pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) not found; install Python 3.11 or pass PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv --clear .venv || { [ "$$(id -u)" = 0 ] && apt-get update && apt-get install -y python3.11-venv && $(PYTHON) -m venv --clear .venv; } \
	  || { rm -rf .venv; echo "error: $(PYTHON) can't make a virtual environment; run: apt-get install python3.11-venv" >&2; exit 1; }
	$(RUN) -m pip install --disable-pip-version-check --quiet --editable '.[dev]'
	@$(RUN) -m pip install --disable-pip-version-check --quiet --editable '.[pesq]' \
	  || echo "note: pesq can't be compiled here (apt-get install gcc python3.11-dev), so PESQ won't be measured" >&2
	touch $@
