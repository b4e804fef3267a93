# make 101<tab>            run experiment 101; on a machine without a GPU, its CPU miniature
# make help                everything else

# A value on the command line is text: DATA='$(shell …)' names a data set. Make would expand such a value where it is used, and
# when it exports it to a recipe. So each one becomes a variable with its own text as value before anything uses it. Recipes read
# values from their environment, never from their own text. (Make expands `make 'A:=…'` and `make '$(…)=1'` before it reads this
# file.)
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

# A word of a recipe, quoted for the shell. A line break becomes a space, because it would end the recipe's line.
override define LINE_BREAK :=


endef
override quoted = '$(subst ','\'',$(subst $(LINE_BREAK), ,$(1)))'

# scripts/setup.sh brings .venv up to a stage, then runs its Python. A command installs by itself what else it needs.
override HARNESS := scripts/setup.sh light -- -m harness
# WORDS passes the names of the settings that have a value, on the command line or in the environment; the harness reads values
# from its environment. TAKES lists what the target takes, as harness/commands.yaml declares it. Whatever else the command line
# sets is passed too, so that the harness refuses it, except for PASSED: variables of other programs.
override WORDS = $(if $(strip $(NAMES)),--given $(foreach name,$(NAMES),$(call quoted,$(name))))
override NAMES = $(foreach key,$(filter-out $(EXPORTED),$(TAKES)),$(if $(value $(key)),$(key))) $(UNKNOWN)
override UNKNOWN = $(filter-out $(TAKES) $(PASSED),$(GIVEN))
override PASSED := VENV PYTHON MEGATRON_LM CXX HOME TMPDIR MASTER_% \
  CUDA_% NCCL_% NVTE_% TORCH% PYTORCH_% GLOO_% OMP_% HF_% PIP_% UV_% XDG_% %_PROXY %_proxy WANDB_API_KEY WANDB_BASE_URL
# Exported for other programs, WANDB_… alone does not turn logging on, nor do PARTITION, IMAGE and the like count without SLURM=1 or K8S=1.
override OF_JOBS = $(if $(value SLURM),$(FOR_SLURM)) $(if $(value K8S),$(FOR_K8S))
override EXPORTED = $(foreach key,$(if $(value WANDB),,$(filter WANDB_%,$(SETTINGS))) $(filter-out $(OF_JOBS),$(FOR_SLURM) $(FOR_K8S)), \
  $(if $(filter environment,$(origin $(key))),$(key)))
# Starts recipes that do not call the harness: the harness refuses settings that the target does not take.
override CHECKED = $(if $(UNKNOWN),$(HARNESS) $@ $(WORDS) &&)

include experiments/targets.mk

# A first screen: all but what developers need, and the settings.
.PHONY: start
start: override LAST := Develop
start: ; @($(HELP); echo 'make help: all this and every setting, KEY=VALUE, of make 101 KEY=VALUE …')$(PIPED)
help: ; @$(CHECKED) (($(HELP))$(PIPED))
# The reader of a pipe, such as head, may close it early: exit status 128 + SIGPIPE.
override PIPED := || [ $$? -eq 141 ]
override HELP = if [ -t 1 ]; then width=$${COLUMNS:-$$(stty size 2>/dev/null </dev/tty | cut -d' ' -f2)}; \
    if [ -z "$$NO_COLOR" ] && [ "$$TERM" != dumb ]; then bold=$$(printf '\033[1m') normal=$$(printf '\033[0m'); fi; fi; \
  awk -v bold="$$bold" -v normal="$$normal" -v width="$$width" -v last=$(call quoted,$(LAST)) -f scripts/help.awk experiments/targets.mk

setup: ; @$(CHECKED) scripts/setup.sh heavy
setup-gpu: ; @$(CHECKED) scripts/setup-gpu.sh
docker-build: ; @$(CHECKED) docker/build.sh
docker-run: ; @$(CHECKED) docker/run.sh
test:
	@$(CHECKED) scripts/setup.sh test data heavy peft calibrate search -- -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not gpu and not full"
test-quick:
	@$(CHECKED) scripts/setup.sh test -- -m pytest -n 2 -m "not cpu and not gpu and not full" --ignore-glob='tests/test_data_*'
test-full:
	@$(CHECKED) scripts/setup.sh test data heavy peft calibrate search tracking -- -m pytest -m ""
lint:
	@$(CHECKED) scripts/setup.sh test -- -m ruff check harness tests benchmarks docker
	@scripts/setup.sh test -- -m ruff format --check --quiet harness tests benchmarks docker
	@if command -v shellcheck >/dev/null; then shellcheck scripts/*.sh docker/*.sh .ci/run; fi
clean-all:
	@$(HARNESS) clean ALL=1 $(WORDS)
	@rm -rf .venv

# `make 101`, `make show-408`, rows newer than targets.mk and misspelt targets. 101 has no rule of its own, so that completion has
# one candidate for it.
.DEFAULT:
	@$(HARNESS) target $(call quoted,$@) $(WORDS)
# Names of files and folders are no targets: `make tests` is a typo of `make test`, which GNU Make would call up to date.
override FILES := $(filter-out Makefile docs,$(filter $(wildcard *),$(MAKECMDGOALS)))
ifneq ($(FILES),)
.PHONY: $(FILES)
$(FILES): ; @$(HARNESS) target $(call quoted,$@) $(WORDS)
endif
