"""Evaluators and the report: a run folder -> results.jsonl -> one HTML page.

the command          __main__ · base (an evaluator's shape) · evaluators/ · record · results · correct · progress
what is evaluated    datasets · sources/ · pictures · captions · published/ · prepare · write_shards · contamination
names of classes     classes · class_files · prompts/ · listing · languages · name_senses · templates · texts
pictures -> features encoder · decode · augment · resolution · features · feature_file · distributed · partition
linear classifiers   logistic · lbfgs · ridge · msn · probes · mae_probe · wsp_probe · lars · held_out · metrics
low-shot             splits · chosen · adapters/
zero-shot            class_embeddings · head · synset_match · answers · classify · hierarchy · confusion
classifiers          classifier · robust/ · mappings/
a look inside        spectra · moments · attention_maps
chains of trainings  compare · comparison/ · transfer · transfers · transfer_* · chain · steps · processes
the page             report · report_* · figures · figures_* · pages/ · papers/
"""
