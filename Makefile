# make 101<tab>            run experiment 101; on a machine without a GPU, its CPU miniature
# make help                everything else

# What the command line sets is text: DATA='$(shell …)' is a data set of an odd name. Make would expand such a value wherever it
# is used, and when it hands it to a recipe; here each becomes a variable of its own text, before anything uses it. Recipes find
# values in their environment, never in their own text. (`make 'A:=…'` and `make '$(…)=1'` are make's own language: it expands
# them before it reads this file.)
override GIVEN := $(foreach name,$(.VARIABLES),$(if $(filter command,$(origin $(name))),$(name)))
override LETTERS := _ a b c d e f g h i j k l m n o p q r s t u v w x y z A B C D E F G H I J K L M N O P Q R S T U V W X Y Z 0 1 2 3 4 5 6 7 8 9
override without_letters = $(1)
$(foreach letter,$(LETTERS),$(eval override without_letters = $$(subst $(letter),,$(value without_letters))))
override PLAIN := $(foreach name,$(filter-out GIVEN LETTERS PLAIN without_letters,$(GIVEN)),$(if $(call without_letters,$(name)),,$(name)))
$(foreach name,$(PLAIN),$(eval override $(name) := $$(value $(name)))$(eval export $(name)))

override SHELL := bash
override .SHELLFLAGS := -c
MAKEFLAGS += --no-builtin-rules --no-builtin-variables --no-print-directory
override .DEFAULT_GOAL := start

# A word of a recipe, whatever is in it; a line break would end the recipe's line.
override define LINE_BREAK :=


endef
override quoted = '$(subst ','\'',$(subst $(LINE_BREAK), ,$(1)))'

# scripts/setup.sh brings .venv up to a stage, then runs its Python. A run asks for the heavy stage (torch) by itself.
override HARNESS := scripts/setup.sh light -- -m harness
override DATA_HARNESS := scripts/setup.sh light data -- -m harness
override CHAT_HARNESS := scripts/setup.sh heavy -- -m harness
override CALIBRATE_HARNESS := scripts/setup.sh light calibrate -- -m harness
# The names of the settings given on the command line or in the environment, whose values are in the environment; and of whatever
# else the command line sets, so that STEP=20 is refused, not ignored. PASSED may stand there too.
override WORDS = $(if $(strip $(NAMES)),--given $(foreach name,$(NAMES),$(call quoted,$(name))))
override NAMES = $(foreach key,$(filter-out $(EXPORTED),$(SETTINGS)) $(MORE),$(if $(value $(key)),$(key))) $(UNKNOWN)
override UNKNOWN = $(filter-out $(SETTINGS) $(MORE) $(PASSED),$(GIVEN))
override PASSED := VENV PYTHON MEGATRON_LM CXX HOME TMPDIR MASTER_% \
  CUDA_% NCCL_% NVTE_% TORCH% PYTORCH_% GLOO_% OMP_% HF_% PIP_% UV_% XDG_% %_PROXY %_proxy WANDB_API_KEY WANDB_BASE_URL
# What is exported for other programs that use Weights & Biases, or for a cluster, asks for nothing without WANDB= or SLURM=.
override EXPORTED = $(foreach key,$(if $(value WANDB),,$(filter WANDB_%,$(SETTINGS))) $(if $(value SLURM),,PARTITION ACCOUNT TIME), \
  $(if $(filter environment,$(origin $(key))),$(key)))

include experiments/targets.mk

.PHONY: checkpoints generate start help list table claims calibrate compare doctor arguments monitor-gpu stop parity profile record report tensorboard plots docs targets clean clean-all
.PHONY: data-list data-prepare data-chat data-clean data-merge data-inspect data-check
.PHONY: import-hf export-hf
.PHONY: setup setup-gpu docker-build docker-run test test-quick test-full lint

##@ Look
# A first screen: all but what developers need, and the settings.
start: override LAST := Develop
start: ; @($(HELP); echo; echo 'make help: all this and every setting, KEY=VALUE, of make 101 KEY=VALUE …')$(PIPED)
help: ## everything, with every setting
	@($(HELP))$(PIPED)
# in a pipe, such as to head, the reader may close it early: 128 + SIGPIPE
override PIPED := || [ $$? -eq 141 ]
override HELP = if [ -t 1 ]; then width=$${COLUMNS:-$$(stty size 2>/dev/null </dev/tty | cut -d' ' -f2)}; \
    if [ -z "$$NO_COLOR" ] && [ "$$TERM" != dumb ]; then bold=$$(printf '\033[1m') normal=$$(printf '\033[0m'); fi; fi; \
  awk -v bold="$$bold" -v normal="$$normal" -v width="$$width" -v last=$(call quoted,$(LAST)) -f scripts/help.awk Makefile experiments/targets.mk
list: override MORE = CHAPTER MODEL
list: ## the catalogue  [CHAPTER=400] [MODEL=gpt2-8.3b] [GPUS=4 at most]
	@$(HARNESS) list $(WORDS)
doctor: ## what is installed, what is missing and how to get it
	@$(HARNESS) doctor
arguments: override MORE = MATCH
arguments: ## upstream's own arguments, counted  [MATCH=moe]
	@$(HARNESS) arguments $(WORDS)

##@ Run:  make 101<tab>, make 101, make show-101, make memory-101, make speed-101, make faster-101, make gpus-101, make chapter-100, make verify-101
# memory-101: what it will take, whether it fits CARD= or the GPUs here, and what to set where it does not.
# speed-101: how long a step will take, and why; faster-101: the layouts of the same work that will take less.
# gpus-101: how many GPUs the same work needs, and what more of them bring.
# verify-101: run it again and compare with its record; RUN=label-or-id compares a run that was made.
verify-%: override MORE = RUN
parity: ## is it correct? every parallelism against one process, loss by loss
	@$(HARNESS) parity
stop: override MORE = RUN
stop: ## end the runs of this machine  [RUN=label]
	@$(HARNESS) stop $(WORDS)
monitor-gpu: ## a live view of the GPUs
	@$(HARNESS) monitor-gpu

checkpoints: override MORE = RUN
checkpoints: ## step, size, loss; whole or not  [RUN=label or folder]
	@$(HARNESS) checkpoints $(WORDS)
generate: override MORE = RUN PROMPT QUESTION TOKENS TEMPERATURE TOP_K TOP_P SEED
generate: ## text from a checkpoint  RUN=label-or-id PROMPT="…" [TOKENS=64] [TEMPERATURE=0.8] [TOP_P=0.9] [SEED=1]; or WEIGHTS=name, QUESTION="…", DATA=name, TOP_K=
	@$(HARNESS) generate $(WORDS)

##@ Read
table: override MORE = CHAPTER ID HARDWARE AGAINST FORMAT
table: ## every run beside its published row  [CHAPTER=100] [FORMAT=terminal|markdown|csv|json]
	@$(HARNESS) table $(WORDS)
claims: override MORE = CHAPTER HARDWARE AGAINST FORMAT
claims: ## do the numbers show what they must?  [CHAPTER=400] [FORMAT=terminal|markdown|json]
	@$(HARNESS) claims $(WORDS)
compare: override MORE = A B FORMAT
compare: ## two runs side by side  A=… B=… (labels or ids)
	@$(HARNESS) compare $(WORDS)
report: override MORE = REPORT
report: ## one page: tables, plots, comparisons  [REPORT=outdir/report.html]
	@$(HARNESS) report $(WORDS)
tensorboard: override MORE = RUN PORT
tensorboard: ## curves of losses, speed and memory, in a browser  [RUN=label-or-id] [PORT=6006]
	@$(HARNESS) tensorboard $(WORDS)
plots: ## memory, step time, scaling, timelines and losses as SVG in outdir/plots
	@$(HARNESS) plots $(WORDS)
profile: override MORE = RUN FORMAT
profile: ## where the time of a traced step goes  RUN=… (label or id) [FORMAT=terminal|csv|json]
	@$(HARNESS) profile $(WORDS)
calibrate: ## fit the formula of make speed-101 to what was measured; minutes
	@$(CALIBRATE_HARNESS) calibrate $(WORDS)
record: override MORE = RUN
record: ## keep a run in experiments/records  RUN=label
	@$(HARNESS) record $(WORDS)

##@ Data:  make data-<tab>, then make 101 DATA=<name>
data-%: override MORE = NAME INPUT OUT FROM TOKENIZER RULES KEY DOCUMENTS LIMIT LONGEST APPEND_EOD SIZE_MB HUB WORKERS SAMPLES
data-list: ## data sets that are, or can be, prepared
	@$(HARNESS) data list
data-prepare: ## one of your own text  NAME=… INPUT=file-or-folder [RULES=sv] [TOKENIZER=…]
	@$(DATA_HARNESS) data prepare $(WORDS)
data-chat: ## conversations, to fine-tune on  NAME=… INPUT=chat.jsonl [TOKENIZER=folder|gpt2|bytes]
	@$(CHAT_HARNESS) data chat $(WORDS)
data-clean: ## text without what its rules drop  INPUT=… OUT=folder [RULES=sv]
	@$(DATA_HARNESS) data clean $(WORDS)
data-merge: ## prepared sets of one tokenizer joined into one  NAME=… FROM="a b"
	@$(DATA_HARNESS) data merge $(WORDS)
data-inspect: ## documents, tokens, lengths, samples  NAME=…
	@$(DATA_HARNESS) data inspect $(WORDS)
data-check: ## is every byte of it in order?  NAME=…
	@$(DATA_HARNESS) data check $(WORDS)

##@ Weights:  make import-hf, then make 101 WEIGHTS=<name>
import-hf: override MORE = HF NAME
import-hf: ## Hugging Face's into Megatron-LM's  HF=folder-or-repository [NAME=…] [TP=…] [PP=…] [EP=…]
	@$(HARNESS) import-hf $(WORDS)
export-hf: override MORE = RUN OUT HF ADAPTERS
export-hf: ## a run's checkpoint as Hugging Face's  RUN=label-or-folder OUT=folder [HF=like-this-one] [ADAPTERS=1]
	@$(HARNESS) export-hf $(WORDS)

##@ Set up
setup: ## everything a run needs, into .venv (the first run does this by itself)
	@scripts/setup.sh heavy
setup-gpu: ## CUDA and Transformer Engine, without a container
	@scripts/setup-gpu.sh
docker-build: ## the GPU image
	@docker/build.sh
docker-run: ## a shell in it, where make 101<tab> works
	@docker/run.sh

##@ Develop
test: ## quick tests, real gloo training, parity: a quarter of an hour
	@scripts/setup.sh test data heavy peft calibrate -- -m pytest -n 2 --dist loadgroup -m "not gpu and not full"
test-quick: ## without torch and without data sets: two minutes
	@scripts/setup.sh test -- -m pytest -n 2 -m "not cpu and not gpu and not full" --ignore-glob='tests/test_data_*'
test-full: ## everything, long ones too
	@scripts/setup.sh test data heavy peft calibrate tracking -- -m pytest -m ""
lint: ## ruff and shellcheck
	@scripts/setup.sh test -- -m ruff check harness tests benchmarks docker
	@scripts/setup.sh test -- -m ruff format --check --quiet harness tests benchmarks docker
	@if command -v shellcheck >/dev/null; then shellcheck scripts/*.sh docker/*.sh .ci/run; fi
targets: ## write experiments/targets.mk anew from the catalogue
	@$(HARNESS) targets
docs: override MORE = CHECK
docs: ## write README.md and docs/ anew from the records  [CHECK=1: only say what is stale]
	@$(HARNESS) docs $(WORDS)
clean: MORE = YES
clean: ## remove runs that failed and cannot be resumed; says which, and asks  [YES=1]
	@$(HARNESS) clean $(WORDS)
clean-all: MORE = YES
clean-all: ## remove every run and .venv; says which, and asks  [YES=1]
	@$(HARNESS) clean ALL=1 $(WORDS)
	@rm -rf .venv

# `make 101`, a row newer than targets.mk and every misspelt target land here; not being a target, 101 is no second candidate
# for completion.
.DEFAULT:
	@$(HARNESS) target $(call quoted,$@) $(WORDS)
# A goal that is only the name of a file or folder is no target: `make tests` is a typo of `make test`, not up to date.
override FILES := $(filter-out Makefile docs,$(filter $(wildcard *),$(MAKECMDGOALS)))
ifneq ($(FILES),)
.PHONY: $(FILES)
$(FILES): ; @$(HARNESS) target $(call quoted,$@) $(WORDS)
endif
