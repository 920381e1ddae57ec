//! [`File`]: where a picture goes, and as what. [`Drawing`]: a picture, whatever it is drawn on.

use std::ffi::OsStr;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Once;

use anyhow::Context;
use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::register_font;

/// A picture's file, of a kind that can be written: who asks for another learns it before anything is measured.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct File {
    path: PathBuf,
    kind: Kind,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Svg,
    Png,
}

impl FromStr for File {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let path = PathBuf::from(text);
        let ending = path.extension().and_then(OsStr::to_str);
        let kind = match ending.map(str::to_ascii_lowercase).as_deref() {
            Some("svg") => Kind::Svg,
            Some("png") => Kind::Png,
            _ => return Err("expected a name that ends in .svg or .png".to_owned()),
        };
        Ok(Self { path, kind })
    }
}

impl File {
    /// Draws it and writes the file.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn write(&self, drawing: &impl Drawing) -> anyhow::Result<()> {
        let bytes = match self.kind {
            Kind::Svg => svg(drawing).map(String::into_bytes),
            Kind::Png => png(drawing),
        };
        std::fs::write(&self.path, bytes.context("drawing")?)
            .with_context(|| format!("cannot write {}", self.path.display()))
    }
}

/// What can be drawn on text and on pixels alike.
pub trait Drawing {
    /// Width and height in pixels.
    fn size(&self) -> (u32, u32);

    /// Draws it.
    ///
    /// # Errors
    /// What it is drawn on fails.
    fn draw<DB>(&self, root: &DrawingArea<DB, Shift>) -> anyhow::Result<()>
    where
        DB: DrawingBackend<ErrorType: 'static>;
}

/// As SVG.
///
/// # Errors
/// As [`Drawing::draw`].
pub fn svg(drawing: &impl Drawing) -> anyhow::Result<String> {
    letters();
    let mut out = String::new();
    {
        let root = SVGBackend::with_string(&mut out, drawing.size()).into_drawing_area();
        drawing.draw(&root)?;
        root.present()?;
    }
    Ok(out)
}

/// As PNG.
fn png(drawing: &impl Drawing) -> anyhow::Result<Vec<u8>> {
    letters();
    let (width, height) = drawing.size();
    let mut pixels = vec![0; 3 * (width * height) as usize];
    {
        let root = BitMapBackend::with_buffer(&mut pixels, (width, height)).into_drawing_area();
        drawing.draw(&root)?;
        root.present()?;
    }
    let mut out = Vec::new();
    let mut encoder = png::Encoder::new(&mut out, width, height);
    encoder.set_color(png::ColorType::Rgb);
    encoder.set_depth(png::BitDepth::Eight);
    let mut writer = encoder.write_header()?;
    writer.write_image_data(&pixels)?;
    writer.finish()?;
    Ok(out)
}

/// Makes `sans-serif` known. An SVG's letters are drawn by who shows it, but their places are measured here.
fn letters() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let known = register_font("sans-serif", FontStyle::Normal, dejavu::sans::regular());
        assert!(known.is_ok(), "the font is a constant that is one");
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Word;

    impl Drawing for Word {
        fn size(&self) -> (u32, u32) {
            (80, 40)
        }

        fn draw<DB>(&self, root: &DrawingArea<DB, Shift>) -> anyhow::Result<()>
        where
            DB: DrawingBackend<ErrorType: 'static>,
        {
            root.fill(&WHITE)?;
            root.draw(&Text::new("1.25×", (10, 10), ("sans-serif", 20)))?;
            Ok(())
        }
    }

    #[test]
    fn a_file_is_what_its_ending_says_and_no_other_is_taken() {
        let folder = std::env::temp_dir();
        for (ending, begins) in [("svg", &b"<svg"[..]), ("PNG", b"\x89PNG\r\n\x1a\n")] {
            let path = folder.join(format!("quire-plot-{}.{ending}", std::process::id()));
            let file: File = path.to_str().unwrap().parse().unwrap();
            file.write(&Word).unwrap();
            let bytes = std::fs::read(&path).unwrap();
            assert!(bytes.starts_with(begins), "{ending}");
            std::fs::remove_file(path).unwrap();
        }
        for name in ["plot.jpg", "plot", "svg", "plot.svg.gz", ""] {
            let error = name.parse::<File>().unwrap_err();
            assert!(error.contains(".svg or .png"), "{name}: {error}");
        }
    }

    #[test]
    fn a_png_has_letters_without_fonts_of_the_system() {
        let bytes = png(&Word).unwrap();
        let mut reader = png::Decoder::new(std::io::Cursor::new(bytes))
            .read_info()
            .unwrap();
        let mut pixels = vec![0; 3 * 80 * 40];
        let info = reader.next_frame(&mut pixels).unwrap();
        assert_eq!((info.width, info.height), (80, 40));
        let black = pixels.iter().filter(|&&value| value < 64).count();
        let white = pixels.iter().filter(|&&value| value > 192).count();
        assert!(black > 100 && white > 2 * black, "{black}, {white}");
    }
}
