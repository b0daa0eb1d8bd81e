//! `cargo xtask plot`: draws the records of every device as SVG, beside them.

use std::collections::BTreeMap;
use std::error::Error as StdError;
use std::fs;
use std::path::Path;

use plotters::prelude::*;

use crate::process::{Error, at};
use crate::record::{self, Device};

const SIZE: (u32, u32) = (960, 540);
const FONT: &str = "sans-serif";
/// Colors that the color-blind can tell apart: Okabe and Ito, *Color Universal Design*.
const COLORS: [RGBColor; 8] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(230, 159, 0),
    RGBColor(86, 180, 233),
    RGBColor(0, 0, 0),
    RGBColor(140, 120, 20),
];

/// Points by the name they have in the legend.
type Series = BTreeMap<String, Vec<(f64, f64)>>;

/// What is drawn, and with which axes.
struct Chart<'a> {
    title: String,
    x: &'a str,
    y: &'a str,
    /// Whether x grows by factors; then it begins above 0.
    logarithmic: bool,
    /// Whether the points of a series are one thing that changes.
    joined: bool,
    series: Series,
}

/// Draws all records below `folder`: `kernel-bandwidth.svg`, and `decode-MODEL.svg` for every model.
///
/// # Errors
///
/// - Those of [`record::devices`], and [`Error::File`] if a drawing cannot be written.
/// - [`Error::Found`] if there is nothing to draw.
pub fn draw_records(folder: &Path) -> Result<(), Error> {
    let mut n_drawn = 0;
    for (device_folder, device) in record::devices(folder)? {
        let name = device_folder.file_name().unwrap_or_default().to_string_lossy().into_owned();
        for (file, chart) in charts(&name, &device) {
            let path = device_folder.join(file);
            let svg = draw(&chart).map_err(|error| Error::Found(format!("{}: {error}", path.display())))?;
            fs::write(&path, svg).map_err(at(&path))?;
            println!("{}", path.display());
            n_drawn += 1;
        }
    }
    if n_drawn == 0 {
        return Err(Error::Found(format!("{}: holds no record to draw", folder.display())));
    }
    Ok(())
}

/// The drawings of a device, by the name of their file.
fn charts<'a>(name: &str, device: &Device) -> Vec<(String, Chart<'a>)> {
    let mut charts = Vec::new();
    let mut series = Series::new();
    for (bench, kernel) in &device.kernels {
        // kernel/OP/TYPES/SHAPE, ceiling/WHAT/SHAPE
        let operation = bench.split('/').nth(1).unwrap_or(bench);
        series.entry(operation.to_owned()).or_default().push((kernel.bytes / 1e6, kernel.rate));
    }
    if !series.is_empty() {
        let chart = Chart {
            title: format!("{name}: memory-bound kernels"),
            x: "MB that a launch moves",
            y: "GB/s",
            logarithmic: true,
            joined: false,
            series,
        };
        charts.push(("kernel-bandwidth.svg".to_owned(), chart));
    }
    for (model, tools) in &device.decode {
        let points = |depths: &BTreeMap<u64, f64>| depths.iter().map(|(&depth, &rate)| (depth as f64, rate)).collect();
        let chart = Chart {
            title: format!("{name}: {model}"),
            x: "tokens in the context",
            y: "tokens generated per second",
            logarithmic: false,
            joined: true,
            series: tools.iter().map(|(tool, depths)| (tool.clone(), points(depths))).collect(),
        };
        let stem = model.strip_suffix(".gguf").unwrap_or(model);
        charts.push((format!("decode-{stem}.svg"), chart));
    }
    charts
}

fn draw(chart: &Chart) -> Result<String, Box<dyn StdError>> {
    let mut svg = String::new();
    {
        let area = SVGBackend::with_string(&mut svg, SIZE).into_drawing_area();
        area.fill(&WHITE)?;
        let points = || chart.series.values().flatten();
        let most = |of: fn(&(f64, f64)) -> f64| points().map(of).fold(0.0, f64::max);
        let least = points().map(|point| point.0).fold(f64::INFINITY, f64::min);
        let (right, top) = (most(|point| point.0), 1.08 * most(|point| point.1));
        let mut builder = ChartBuilder::on(&area);
        builder.caption(&chart.title, (FONT, 24)).margin(12).x_label_area_size(52).y_label_area_size(72);
        // The two kinds of axes are two types.
        macro_rules! on_axes {
            ($x:expr) => {{
                let mut axes = builder.build_cartesian_2d($x, 0.0..top)?;
                let number = |x: &f64| if *x >= 10.0 || *x == 0.0 { format!("{x:.0}") } else { format!("{x}") };
                let mut mesh = axes.configure_mesh();
                mesh.x_desc(chart.x).y_desc(chart.y).x_label_formatter(&number).y_label_formatter(&number);
                mesh.label_style((FONT, 17)).axis_desc_style((FONT, 19));
                mesh.light_line_style(TRANSPARENT).bold_line_style(BLACK.mix(0.12)).draw()?;
                for (i, (name, points)) in chart.series.iter().enumerate() {
                    let color = COLORS[i % COLORS.len()];
                    // A second round of colors is told apart by hollow points.
                    let style = if i < COLORS.len() { color.filled() } else { color.stroke_width(1) };
                    if chart.joined {
                        axes.draw_series(LineSeries::new(points.iter().copied(), color.stroke_width(2)))?;
                    }
                    let circles = points.iter().map(|&point| Circle::new(point, 4, style));
                    axes.draw_series(circles)?
                        .label(name.as_str())
                        .legend(move |at| Circle::new((at.0 + 8, at.1), 4, style));
                }
                let mut legend = axes.configure_series_labels();
                legend.position(if chart.joined {
                    SeriesLabelPosition::LowerLeft
                } else {
                    SeriesLabelPosition::UpperLeft
                });
                legend.label_font((FONT, 17));
                legend.background_style(WHITE.mix(0.8)).border_style(BLACK.mix(0.3)).draw()?;
            }};
        }
        if chart.logarithmic {
            on_axes!((least / 1.5..right * 1.5).log_scale());
        } else {
            on_axes!(0.0..(1.05 * right).max(1.0));
        }
        area.present()?;
    }
    Ok(svg)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::Kernel;

    #[test]
    fn drawings_name_every_series_and_have_a_point_for_each_record() {
        let mut device = Device::default();
        for (bench, bytes) in [("kernel/matvec/a/1", 1e6), ("kernel/matvec/a/2", 2e8), ("kernel/rope/f32/1", 2e4)] {
            device.kernels.insert(bench.to_owned(), Kernel { bytes, rate: 1e-6 * bytes });
        }
        let depths = BTreeMap::from([(0, 300.0), (4096, 250.0)]);
        device.decode.insert("g.gguf".to_owned(), BTreeMap::from([("gamma 0.1.0".to_owned(), depths)]));
        let charts = charts("some-card", &device);
        let files: Vec<&str> = charts.iter().map(|(file, _)| file.as_str()).collect();
        assert_eq!(files, ["kernel-bandwidth.svg", "decode-g.svg"]);
        for ((_, chart), (n_points, texts)) in
            charts.iter().zip([(3, &["matvec", "rope", "GB/s"][..]), (2, &["gamma 0.1.0", "some-card: g.gguf"])])
        {
            let svg = draw(chart).expect("it can be drawn");
            // One more for each series' entry in the legend.
            assert_eq!(svg.matches("<circle").count(), n_points + chart.series.len(), "{svg}");
            assert!(texts.iter().all(|text| svg.contains(text)), "{svg}");
            assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
        }
    }

    #[test]
    fn a_folder_without_records_is_refused() {
        let folder = std::env::temp_dir().join(format!("xtask-plot-{}", std::process::id()));
        fs::create_dir_all(&folder).expect("the folder for temporary files takes one");
        let error = draw_records(&folder).expect_err("there is nothing to draw").to_string();
        fs::remove_dir(&folder).expect("it is empty");
        assert!(error.ends_with("holds no record to draw"), "{error}");
    }
}
