//! Writes small GGUF files.

/// A file as it grows; values and tensors in order.
#[derive(Default)]
pub struct Gguf {
    values: Vec<u8>,
    value_count: u64,
    infos: Vec<u8>,
    tensor_count: u64,
    data: Vec<u8>,
}

fn string(text: &str, out: &mut Vec<u8>) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

impl Gguf {
    /// A value of type `kind`, as its bytes.
    pub fn value(&mut self, key: &str, kind: u32, bytes: &[u8]) -> &mut Self {
        string(key, &mut self.values);
        self.values.extend(kind.to_le_bytes());
        self.values.extend(bytes);
        self.value_count += 1;
        self
    }

    pub fn number(&mut self, key: &str, value: u32) -> &mut Self {
        self.value(key, 4, &value.to_le_bytes())
    }

    pub fn float(&mut self, key: &str, value: f32) -> &mut Self {
        self.value(key, 6, &value.to_le_bytes())
    }

    pub fn text(&mut self, key: &str, text: &str) -> &mut Self {
        let mut bytes = Vec::new();
        string(text, &mut bytes);
        self.value(key, 8, &bytes)
    }

    pub fn texts<'a>(&mut self, key: &str, texts: impl IntoIterator<Item = &'a str>) -> &mut Self {
        let mut bytes = Vec::new();
        let mut count = 0_u64;
        for text in texts {
            string(text, &mut bytes);
            count += 1;
        }
        let head = [&8_u32.to_le_bytes()[..], &count.to_le_bytes()[..]].concat();
        self.value(key, 9, &[head, bytes].concat())
    }

    pub fn numbers(&mut self, key: &str, numbers: &[i32]) -> &mut Self {
        let mut bytes = 5_u32.to_le_bytes().to_vec();
        bytes.extend((numbers.len() as u64).to_le_bytes());
        bytes.extend(numbers.iter().flat_map(|n| n.to_le_bytes()));
        self.value(key, 9, &bytes)
    }

    /// A tensor of ggml's type `kind`; `shape` outermost first.
    pub fn tensor(&mut self, name: &str, shape: &[usize], kind: u32, data: &[u8]) -> &mut Self {
        string(name, &mut self.infos);
        self.infos.extend((shape.len() as u32).to_le_bytes());
        for &size in shape.iter().rev() {
            self.infos.extend((size as u64).to_le_bytes());
        }
        self.infos.extend(kind.to_le_bytes());
        self.infos.extend((self.data.len() as u64).to_le_bytes());
        self.data.extend(data);
        self.data.resize(self.data.len().next_multiple_of(32), 0);
        self.tensor_count += 1;
        self
    }

    pub fn bytes(&self) -> Vec<u8> {
        let mut file = b"GGUF\x03\0\0\0".to_vec();
        file.extend(self.tensor_count.to_le_bytes());
        file.extend(self.value_count.to_le_bytes());
        file.extend(&self.values);
        file.extend(&self.infos);
        file.resize(file.len().next_multiple_of(32), 0);
        file.extend(&self.data);
        file
    }
}
