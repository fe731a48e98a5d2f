"""Display of results: tables, JSON, Markdown, CSV, plots. Names load on first use."""

from typing import TYPE_CHECKING

from modelopt_cli.lazy_names import lazy_names

if TYPE_CHECKING:
    from modelopt_cli.report.curves import draw_curve
    from modelopt_cli.report.dry_run import plan_json, plan_table
    from modelopt_cli.report.evaluation_table import group, html, plain_text, svg, table, to_svg
    from modelopt_cli.report.exports import check_export, csv_text, export, markdown_text, to_json
    from modelopt_cli.report.layers import (
        coverage_json,
        coverage_lines,
        coverage_table,
        layer_table,
        layers_json,
    )
    from modelopt_cli.report.plots import require_plots
    from modelopt_cli.report.pruned import pruned_json, pruned_table, target_line
    from modelopt_cli.report.sensitivities import plot_sensitivity, sensitivity_json, sensitivity_table
    from modelopt_cli.report.shared import shared_json, shared_table

_HOMES = {
    "check_export": "exports",
    "coverage_json": "layers",
    "coverage_lines": "layers",
    "coverage_table": "layers",
    "csv_text": "exports",
    "draw_curve": "curves",
    "export": "exports",
    "group": "evaluation_table",
    "html": "evaluation_table",
    "layer_table": "layers",
    "layers_json": "layers",
    "markdown_text": "exports",
    "plain_text": "evaluation_table",
    "plan_json": "dry_run",
    "plan_table": "dry_run",
    "plot_sensitivity": "sensitivities",
    "pruned_json": "pruned",
    "pruned_table": "pruned",
    "require_plots": "plots",
    "sensitivity_json": "sensitivities",
    "sensitivity_table": "sensitivities",
    "shared_json": "shared",
    "shared_table": "shared",
    "svg": "evaluation_table",
    "table": "evaluation_table",
    "target_line": "pruned",
    "to_json": "exports",
    "to_svg": "evaluation_table",
}

__all__ = [
    "check_export",
    "coverage_json",
    "coverage_lines",
    "coverage_table",
    "csv_text",
    "draw_curve",
    "export",
    "group",
    "html",
    "layer_table",
    "layers_json",
    "markdown_text",
    "plain_text",
    "plan_json",
    "plan_table",
    "plot_sensitivity",
    "pruned_json",
    "pruned_table",
    "require_plots",
    "sensitivity_json",
    "sensitivity_table",
    "shared_json",
    "shared_table",
    "svg",
    "table",
    "target_line",
    "to_json",
    "to_svg",
]


__getattr__ = lazy_names(__name__, _HOMES)
