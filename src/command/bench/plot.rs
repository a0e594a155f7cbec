//! Throughput and latency against tasks, as a drawing.

use std::error::Error;
use std::path::Path;

use plotters::prelude::*;

use super::Failure;
use super::report::Row;
use super::work::Work;

const SIZE: (u32, u32) = (1000, 900);
const LINES: [RGBColor; 9] = [
    RGBColor(31, 119, 180),
    RGBColor(255, 127, 14),
    RGBColor(44, 160, 44),
    RGBColor(214, 39, 40),
    RGBColor(148, 103, 189),
    RGBColor(140, 86, 75),
    RGBColor(227, 119, 194),
    RGBColor(127, 127, 127),
    RGBColor(23, 190, 207),
];

pub(crate) fn draw(path: &Path, rows: &[Row]) -> Result<(), Failure> {
    let area = SVGBackend::new(path, SIZE).into_drawing_area();
    drawn(&area, rows).map_err(|error| Failure::new(1, format!("{}: {error}", path.display())))
}

fn drawn(
    area: &DrawingArea<SVGBackend<'_>, plotters::coord::Shift>,
    rows: &[Row],
) -> Result<(), Box<dyn Error + Send + Sync>> {
    area.fill(&WHITE)?;
    let (upper, lower) = area.split_vertically(SIZE.1 / 2);
    chart(&upper, rows, "operations a second", Row::per_second)?;
    chart(&lower, rows, "median, microseconds", |row| row.micros(50.0))?;
    area.present()?;
    Ok(())
}

fn chart(
    area: &DrawingArea<SVGBackend<'_>, plotters::coord::Shift>,
    rows: &[Row],
    caption: &str,
    of: impl Fn(&Row) -> f64,
) -> Result<(), Box<dyn Error + Send + Sync>> {
    // A logarithm has no zero.
    let of = |row: &Row| of(row).max(1.0);
    let tasks = rows.iter().map(|row| row.tasks as f64);
    let most = tasks.fold(1.0, f64::max);
    let least = rows.iter().map(&of).fold(f64::INFINITY, f64::min).min(1e9);
    let largest = rows.iter().map(&of).fold(1.0, f64::max);
    let mut chart = ChartBuilder::on(area)
        .caption(caption, ("sans-serif", 20))
        .margin(12)
        .x_label_area_size(36)
        .y_label_area_size(84)
        .build_cartesian_2d((0.9..most * 1.1).log_scale(), (least / 1.5..largest * 1.5).log_scale())?;
    chart.configure_mesh().x_desc("tasks").draw()?;
    for (work, colour) in Work::ALL.into_iter().zip(LINES) {
        let points: Vec<_> = rows
            .iter()
            .filter(|row| row.work == work && !row.took.is_empty())
            .map(|row| (row.tasks as f64, of(row)))
            .collect();
        if points.is_empty() {
            continue;
        }
        chart
            .draw_series(LineSeries::new(points, colour.stroke_width(2)).point_size(3))?
            .label(work.to_string())
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 20, y)], colour));
    }
    chart
        .configure_series_labels()
        .background_style(WHITE.mix(0.8))
        .border_style(BLACK)
        .draw()?;
    Ok(())
}
