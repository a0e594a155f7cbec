//! Curves over a logarithm of both.

use std::error::Error;
use std::path::Path;

use plotters::prelude::*;
use registry_api::BoxError;

const SIZE: (u32, u32) = (900, 480);
const COLOURS: [RGBColor; 4] = [
    RGBColor(31, 119, 180),
    RGBColor(44, 160, 44),
    RGBColor(255, 127, 14),
    RGBColor(214, 39, 40),
];

pub(crate) struct Curve {
    pub(crate) name: String,
    pub(crate) points: Vec<(f64, f64)>,
}

pub(crate) fn draw(path: &Path, caption: &str, (across, up): (&str, &str), curves: &[Curve]) -> Result<(), BoxError> {
    drawn(path, caption, (across, up), curves).map_err(|error| format!("{}: {error}", path.display()).into())
}

fn drawn(
    path: &Path,
    caption: &str,
    (across, up): (&str, &str),
    curves: &[Curve],
) -> Result<(), Box<dyn Error + Send + Sync>> {
    let area = SVGBackend::new(path, SIZE).into_drawing_area();
    area.fill(&WHITE)?;
    let all = || curves.iter().flat_map(|curve| &curve.points);
    let bounds = |of: fn(&(f64, f64)) -> f64| {
        let least = all().map(of).fold(f64::INFINITY, f64::min);
        let most = all().map(of).fold(0.0, f64::max);
        (least / 1.3)..(most * 1.3)
    };
    let mut chart = ChartBuilder::on(&area)
        .caption(caption, ("sans-serif", 18))
        .margin(12)
        .x_label_area_size(40)
        .y_label_area_size(84)
        .build_cartesian_2d(bounds(|point| point.0).log_scale(), bounds(|point| point.1).log_scale())?;
    chart.configure_mesh().x_desc(across).y_desc(up).draw()?;
    for (curve, colour) in curves.iter().zip(COLOURS) {
        chart
            .draw_series(LineSeries::new(curve.points.clone(), colour.stroke_width(2)).point_size(3))?
            .label(&curve.name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 20, y)], colour));
    }
    chart
        .configure_series_labels()
        .background_style(WHITE.mix(0.8))
        .border_style(BLACK)
        .draw()?;
    area.present()?;
    Ok(())
}
